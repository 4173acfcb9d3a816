"""Exact averaging of sparse changes whose entries are others at each site: over the union of their indices.

    dW* = E + sum_k p_k scatter(I_k, v_k)       (p_k, I_k, v_k: site k's weight, index and values; E: the owner's rest)

An entry that a site does not have is zero in its matrix. Sites go on from as many entries as they had, the largest of
the mean, so that one index and its values leave for all of them. The rest stays with the owner, is in every plug-in,
and is added to what sites make of these entries if they grow them again (error feedback, arXiv 1809.07599). A round in
which nobody changes anything gives the same version, bit for bit, and so does another order of the sites: the sum is
compensated. It takes the memory of the union, which is at most that of the matrix.
What of a method is no such pair is averaged by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from offsite.coordinator.aggregation.base import Origin, Sums, Version, joined
from offsite.coordinator.aggregation.mean import TensorMean
from offsite.kernels.schema import Rule, Schema, TensorMap, Tensors, Tier, entries
from offsite.kernels.sparse import Total, Vector, largest
from offsite.protos.documents import document
from offsite.protos.errors import InputError

RESIDUAL = "residual"


@document
class IndexUnion:
    """Average sparse matrices exactly; send on the largest entries of the mean, as many as before."""

    name: ClassVar[str] = "index-union"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.UNION, Rule.MEAN, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.UNION, Rule.MEAN, Rule.FIXED})
    linear: ClassVar[bool] = False
    mixed_tiers: ClassVar[bool] = False
    needs: ClassVar[Literal["updates", "sum"]] = "updates"

    def begin(self, last: Version, schema: Schema) -> "_Fold":
        """Open a round on top of what the last one left to the owner."""
        return _Fold(last, schema)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        version = joined(parts)
        return replace(version, figures=_figures(version.sums))


class _Fold:
    def __init__(self, last: Version, schema: Schema) -> None:
        self._last = last
        self._keys = dict(sorted(entries(schema).items()))
        self._others = TensorMean({key: field for key, field in schema.items() if field.rule is not Rule.UNION})
        self._totals = {group: Total() for group in self._keys}
        self._counts: dict[str, int] = {}  # entries of an update

    def add(self, update: TensorMap, origin: Origin) -> None:
        self._others.add(update, origin)
        for group, keys in self._keys.items():
            index, values = update[keys.at], update[keys.values]
            if self._counts.setdefault(group, len(index)) != len(index):
                raise InputError(
                    f"{keys.at} has {len(index)} entries at {origin.site} and {self._counts[group]} at others; "
                    "all sites of a run train as many"
                )
            self._totals[group].add(Vector(index, values), origin.weight)

    def finish(self, tiers: Iterable[Tier]) -> Version:
        left = self._last.state.get(RESIDUAL, {})
        adapter, sent, rest, sums = Tensors(), Tensors(), Tensors(), Sums()
        for group, keys in self._keys.items():
            total = self._totals.pop(group)
            if keys.at in left:
                total.add(Vector(left[keys.at], left[keys.values]))
            whole = total.vector()
            chosen = largest(whole.values, self._counts[group])
            kept = torch.zeros(len(whole.values), dtype=torch.bool).index_fill(0, chosen, value=True)
            zero = whole.values == 0  # of what is left, they say nothing
            for tensors, mask in ((adapter, kept | ~zero), (sent, kept), (rest, ~kept & ~zero)):
                tensors |= {keys.at: whole.at[mask], keys.values: whole.values[mask]}
            for name, values in (("all", adapter[keys.values]), ("rest", rest[keys.values])):
                sums.setdefault(name, {})[group] = float(values.double().square().sum())
        others = self._others.finish(()).adapter
        broadcast = dict.fromkeys(tiers, others | sent)
        return Version(others | adapter, broadcast, {RESIDUAL: rest} if rest else {}, _figures(sums), sums)


def _figures(sums: Sums) -> dict[str, float]:
    """Return the share of the mean's norm that stays with the owner."""
    whole, rest = (sum(sums.get(name, {}).values()) for name in ("all", "rest"))
    return {"residual": (rest / whole) ** 0.5 if whole else 0.0} if sums else {}
