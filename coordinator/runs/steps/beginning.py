"""The version that a run begins from."""

from collections.abc import Iterable, Mapping

from torch import nn

from offsite.coordinator.aggregation import Version
from offsite.emulator.methods import Method
from offsite.kernels.schema import Tier


def first(
    method: Method, emulator: nn.Module, places: Mapping[int, int], *, tiers: Iterable[Tier], seed: int
) -> Version:
    """Return the version that changes nothing, whose adapter is that of the largest tier."""
    starts = {tier: method.start(emulator, places, seed=seed, tier=tier) for tier in sorted({*tiers})}
    return Version(max(starts.values(), key=lambda start: sum(tensor.nbytes for tensor in start.values())), starts)
