"""Updates that are far larger than the others of their round, which would drown them in the average."""

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from offsite.kernels.schema import Tier

FEWEST = 3  # updates whose median says what is usual; two cannot outvote each other


class Change(NamedTuple):
    """How much an update changed the broadcast, in L2 norm, and the tier of its site."""

    norm: float
    tier: Tier


def outliers(changes: Mapping[str, Change], *, ratio: float) -> dict[str, str]:
    """Say which sites' updates are larger than `ratio` times the median of their tier's, each with the reason.

    A tier with fewer than FEWEST updates is not judged, nor one of which most changed nothing. What is left out is
    left out whole: scaled down it would still point where its site wants it to.
    """
    reasons: dict[str, str] = {}
    norms: dict[Tier, list[float]] = {}
    for change in changes.values():
        norms.setdefault(change.tier, []).append(change.norm)
    medians = {tier: median(of_tier) for tier, of_tier in norms.items()}
    for site, change in sorted(changes.items()):
        usual = medians[change.tier]
        if len(norms[change.tier]) >= FEWEST and usual > 0 and change.norm > ratio * usual:
            reasons[site] = (
                f"its update changed by a norm of {change.norm:.3g}, more than {ratio:g} times the round's median of "
                f"{usual:.3g} (max_update_ratio)"
            )
    return reasons
