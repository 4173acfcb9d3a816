"""How long a round waits once enough updates are in.

    t_1 <= t_2 <= ...       when the updates of a round came, in seconds since it began
    t_q (1 + grace)         when it closes, q being the quorum

The window is a share of what the round itself took, so that it fits rounds of seconds and of days; with a quorum of two
or more one early bird does not shorten it. A minimum quorum and an adaptive grace window are those of Decoupled DiLoCo
(arXiv 2604.21428).
"""

from collections.abc import Sequence
from math import ceil
from random import Random
from typing import NamedTuple

from offsite.protos.spec import RunSpec

WITHOUT = "its round closed without its update"  # whoever was late


class Quorum(NamedTuple):
    """How many updates are enough, and how long the others still have."""

    updates: int
    grace: float  # times as long as the quorum took

    def end(self, began: float, came: float, *, since: float = 0.0) -> float:
        """Return when a round closes that began at a time, its quorum having come at another.

        Before `since` nobody was there to whom the others could have come.
        """
        return max(came, since) + self.grace * max(0.0, came - began)


def of(spec: RunSpec) -> Quorum | None:
    """Return the quorum of a run's rounds; None where everybody is waited for.

    Where more sites are drawn than a round needs, those that it does not need are not waited for.
    """
    if spec.quorum or not spec.spare:
        return Quorum(spec.quorum, spec.grace) if spec.quorum else None
    return Quorum(spec.sites_per_round, 0.0)


def drawn(names: Sequence[str], spec: RunSpec, *, seed: str) -> list[str]:
    """Return by name the sites that a round asks, of those that could take part: all, or as many as a run draws."""
    count = ceil(spec.sites_per_round * (1 + spec.spare)) or len(names)
    return sorted(names if count >= len(names) else Random(seed).sample(sorted(names), count))
