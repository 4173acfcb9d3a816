"""A dynamic average, whose weight is made of how plastic and how stable training is (Qiao et al., arXiv 2410.10868).

    theta* <- (1 - b) theta* + b theta_t,    b = 2 (1 + |g_t|) / (|theta_t - theta*| |g_t - g_(t-1)|)

with sums of absolute values, for each tensor, or for each product as the matrix that it is. It holds where it is in
(0, 1); elsewhere, and where there is no gradient before, it is `least` for each optimiser step of the round, as theirs
is 0.01. A gradient is here the change of a round, for the owner sees no other.
Sites go on from theta_t; after a run's last round theta* is the version, and so what serves and what others go on from.
Like LAE it begins with the version that a run goes on from: before a first task there is nothing to keep.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from offsite.coordinator.aggregation.base import Version
from offsite.coordinator.memory.averages import Averaging, average, moving
from offsite.coordinator.memory.base import PREFIX, Combine, Moment
from offsite.kernels.schema import Factors, Rule, Schema, Tensors, factors, groups
from offsite.protos.documents import document

AVERAGE = PREFIX + "average"
BEFORE = PREFIX + "before"  # the adapter of the round before the last


@document
class Ema(Averaging):
    """Average the rounds of a run into the version that it went on from, and end with that."""

    name: ClassVar[str] = "ema"
    replaces: ClassVar[bool] = True
    combine: ClassVar[Combine] = "one"
    least: float = 0.01  # weight of an optimiser step where the rule gives none
    rank: int = 0  # most ranks of its products; 0: as many as its average has, so that it is exact

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.least < 1 or self.rank < 0:
            raise ValueError(f"least must be in (0, 1) and rank at least 0, got {self.least:g} and {self.rank}")

    def begin(self, last: Version, start: Version, schema: Schema, moment: Moment) -> Version:
        """Begin with the version that a run goes on from; a gradient of another run is none of this one's."""
        if not moment.before:
            return last
        state = {name: kept for name, kept in last.state.items() if name != BEFORE}
        return replace(last, state={AVERAGE: last.adapter} | state)

    def after(self, last: Version, new: Version, schema: Schema, moment: Moment) -> Version:
        """Average a round in, and end with the average after the last one."""
        if AVERAGE not in last.state:
            return new
        shares = self.shares(last, new, schema, moment)
        kept = average(last.state[AVERAGE], new.adapter, shares, schema, rank=self.rank)
        figures = new.figures | {"average_share": sum(shares.values()) / len(shares)}
        if moment.round == moment.rounds:
            return replace(new, adapter=kept, state=new.state | {AVERAGE: kept}, figures=figures)
        return replace(new, state=new.state | {AVERAGE: kept, BEFORE: last.adapter}, figures=figures)

    def shares(self, last: Version, new: Version, schema: Schema, moment: Moment) -> dict[str, float]:
        """Return by group the weight of a round."""
        fallback = 1.0 - (1.0 - self.least) ** moment.steps
        if BEFORE not in last.state:
            return dict.fromkeys(moving(schema), fallback)
        adapters = (last.state[AVERAGE], last.state[BEFORE], last.adapter, new.adapter)
        keys, pairs = groups(schema), factors(schema)
        shares = {}
        for group in moving(schema):
            moved = [key for key in keys[group] if schema[key].rule is not Rule.FIXED]
            share = _share(*(_values(adapter, moved, pairs.get(group)) for adapter in adapters))
            shares[group] = share if 0 < share < 1 else fallback
        return shares

    def experts(self, version: Version) -> dict[str, Tensors]:
        """Return the average."""
        return {"average": version.state.get(AVERAGE, version.adapter)}


def _share(mean: Tensor, before: Tensor, last: Tensor, new: Tensor) -> float:
    """Return b as the rule has it; infinite where nothing moves, and NaN where nothing ever has."""
    gradient = new - last
    drift, turn = (new - mean).abs().sum(), (gradient - (last - before)).abs().sum()
    return float(2 * (1 + gradient.abs().sum()) / (drift * turn))


def _values(adapter: Tensors, keys: list[str], pair: Factors | None) -> Tensor:
    """Return what a group of tensors stands for, in float64 and in one row: a product as its matrix."""
    if pair is not None:
        return (adapter[pair.B].double() @ adapter[pair.A].double()).flatten()
    return torch.cat([adapter[key].double().flatten() for key in keys])
