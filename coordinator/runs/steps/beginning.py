"""The version that a run begins from."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from offsite.coordinator.aggregation import Version
from offsite.coordinator.runs import versions
from offsite.coordinator.runs.steps.orders import Continued
from offsite.coordinator.runs.steps.results import Built
from offsite.coordinator.store.blobs import Blobs
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.methods.base import Beginning
from offsite.kernels.schema import Tier, settle
from offsite.protos import tensors
from offsite.protos.errors import MismatchError


def first(
    method: Method,
    emulator: nn.Module,
    places: Mapping[int, int],
    *,
    tiers: Iterable[Tier],
    seed: int,
    statistics: Adapter | None = None,
) -> Version:
    """Return the version that changes nothing, whose adapter is that of the largest tier.

    With `statistics` it is made of what sites have measured; raises ValueError if the method cannot begin from them.
    """
    starts = {}
    for tier in sorted({*tiers}):
        if statistics is not None and isinstance(method, Beginning):
            starts[tier] = method.begin(emulator, places, statistics, seed=seed, tier=tier)
        else:
            starts[tier] = method.start(emulator, places, seed=seed, tier=tier)
    return Version(max(starts.values(), key=lambda start: sum(tensor.nbytes for tensor in start.values())), starts)


def check_origin(built: Built, continued: Continued) -> None:
    """Raise MismatchError unless a version to go on from is of what was built."""
    for what, own, its in (
        ("of base", built.base.digest, continued.base),
        ("of layers", list(built.bundle.trainable), list(continued.trainable)),
        ("brought to the base by", built.recovery, continued.recovery),
    ):
        if own != its:
            raise MismatchError(f"the version to go on from is {what} {its}, what was built {own}")


def go_on(blobs: Blobs, built: Built, continued: Continued) -> versions.Version:
    """Return another run's version for the tiers of this one; raises MismatchError unless it is of what was built."""
    check_origin(built, continued)
    schema, sent = versions.read_schema(blobs, built.schema), continued.version.broadcast
    if missing := sorted(built.version.broadcast.keys() - sent.keys()):
        raise MismatchError(f"the version to go on from has nothing for sites of tier {missing[0]}, only of {[*sent]}")
    for tier, start in built.version.broadcast.items():
        shapes = {name: entry.shape for name, entry in tensors.header(blobs.path(start.digest)).items()}
        what = f"the version to go on from, tier {tier}" if tier else "the version to go on from"
        tensors.check_header(blobs.path(sent[tier].digest), settle(schema, shapes), what=what)
    return replace(continued.version, broadcast={tier: sent[tier] for tier in built.version.broadcast}, figures={})
