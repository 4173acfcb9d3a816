"""One round's updates become the next version, wherever they are kept: in files, or in a simulation's memory."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from offsite.coordinator.aggregation.base import Origin, Strategy, Version
from offsite.coordinator.aggregation.outliers import Change, outliers
from offsite.kernels.schema import Schema, TensorMap, Tier
from offsite.protos.errors import MismatchError, RunError
from offsite.protos.spec import RunSpec


@dataclass(frozen=True)
class Sent:
    """An update that was let in."""

    site: str
    tier: Tier
    examples: int  # that it saw: its weight
    norm: float  # L2 norm of the change since its broadcast
    open: Callable[[], AbstractContextManager[TensorMap]]  # the adapter that it stands for


@dataclass(frozen=True)
class Outcome:
    """The version that a round ends in, and who is in it."""

    version: Version
    weights: dict[str, float]  # by site
    left_out: dict[str, str] = field(default_factory=dict)  # site -> why its update is not in it


def fold(
    strategy: Strategy, last: Version, schema: Schema, sent: Sequence[Sent], *, spec: RunSpec, tiers: Iterable[Tier]
) -> Outcome:
    """Fold the updates of a round on top of the last version, in the order of the sites' names.

    Those far larger than the others are left out, and named. `tiers` are those of the sites that may train next.
    Raises RunError if too few are left, MismatchError for an average that is not finite.
    """
    left_out = outliers({one.site: Change(one.norm, one.tier) for one in sent}, ratio=spec.max_update_ratio)
    taken = sorted((one for one in sent if one.site not in left_out), key=lambda one: one.site)
    if len(taken) < spec.min_sites:
        why = "; ".join(f"{site}: {reason}" for site, reason in left_out.items())
        raise RunError(f"{len(taken)} of at least {spec.min_sites} updates are left in the round ({why})")
    running, total = strategy.begin(last, schema), sum(one.examples for one in taken)
    weights = {one.site: one.examples / total for one in taken}
    for one in taken:
        with one.open() as adapter:
            running.add(adapter, Origin(one.site, one.tier, weights[one.site]))
    version = running.finish(sorted(tiers))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in version.adapter.values()):
        raise MismatchError("the average of the updates is not finite; lower max_update_norm and look at the sites")
    return Outcome(version, weights, left_out)
