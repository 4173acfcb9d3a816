"""Voting on bits: each becomes what sites with more than half of the weight have it to be; a tie leaves it as it was.

A mask that was averaged would be none: bits are counted, not weights multiplied. The same bits in any order of the
sites, for the shares are summed as integers. An average of scores would tell of each weight how near it is to its
threshold; a vote takes a byte for eight weights, and tells of none more than on which side it is.
What of a method is no bit is averaged by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from offsite.coordinator.aggregation.base import Origin, Sums, Version, joined
from offsite.coordinator.aggregation.mean import TensorMean
from offsite.kernels.bits import pack, unpack
from offsite.kernels.schema import Rule, Schema, TensorMap, Tensors, Tier, votes
from offsite.protos.documents import document

WHOLE = 1 << 30  # a weight of one, as an integer: sums of a round's weights stay below 2^31


@document
class Vote:
    """Take for each bit what most of the weight has."""

    name: ClassVar[str] = "vote"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.VOTE, Rule.MEAN, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    linear: ClassVar[bool] = False
    mixed_tiers: ClassVar[bool] = False
    needs: ClassVar[Literal["updates", "sum"]] = "updates"

    def begin(self, last: Version, schema: Schema) -> "_Fold":
        """Open a round on top of the last version's bits."""
        return _Fold(last, schema)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        version = joined(parts)
        return replace(version, figures=_figures(version.sums))


@dataclass
class _Count:
    """The weight of those that have each bit of a tensor set, (n,) int32, and of all, in parts of WHOLE."""

    bits: int
    on: Tensor = field(init=False)
    all: int = 0
    sites: int = 0

    def __post_init__(self) -> None:
        self.on = torch.zeros(self.bits, dtype=torch.int32)

    def add(self, packed: Tensor, weight: float) -> None:
        share = round(weight * WHOLE)
        self.on.add_(unpack(packed, self.bits), alpha=share)
        self.all, self.sites = self.all + share, self.sites + 1

    def decided(self, last: Tensor) -> Tensor:
        """Return the bits (n,); weights that were rounded may miss a tie by one part for each site."""
        more = 2 * self.on.long() - self.all
        return torch.where(more.abs() <= self.sites, unpack(last, self.bits) > 0, more > 0)

    def agreement(self, bits: Tensor) -> float:
        """Return the sum over all bits of the share of the weight that has what was decided."""
        return int(torch.where(bits, self.on, self.all - self.on).sum(dtype=torch.int64)) / self.all


class _Fold:
    def __init__(self, last: Version, schema: Schema) -> None:
        self._last = last
        self._others = TensorMean({key: field for key, field in schema.items() if field.rule is not Rule.VOTE})
        self._counts = {key: _Count(bits) for key, bits in sorted(votes(schema).items())}

    def add(self, update: TensorMap, origin: Origin) -> None:
        self._others.add(update, origin)
        for key, count in self._counts.items():
            count.add(update[key], origin.weight)

    def finish(self, tiers: Iterable[Tier]) -> Version:
        adapter, sums = Tensors(), Sums()
        for key, count in self._counts.items():
            bits = count.decided(self._last.adapter[key])
            adapter[key] = pack(bits)
            values = {"bits": count.bits, "zeros": count.bits - int(bits.sum()), "agreed": count.agreement(bits)}
            for name, value in values.items():
                sums.setdefault(name, {})[key] = float(value)
        adapter |= self._others.finish(()).adapter
        return Version(adapter, dict.fromkeys(tiers, adapter), figures=_figures(sums), sums=sums)


def _figures(sums: Sums) -> dict[str, float]:
    """Return the share of zeros among the bits, and that of the weight that has what was decided."""
    total = {name: sum(values.values()) for name, values in sums.items()}
    return {"zeros": total["zeros"] / total["bits"], "agreement": total["agreed"] / total["bits"]} if sums else {}
