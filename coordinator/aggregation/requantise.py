"""Averaging what few bits stand for: decoded, averaged and encoded again, and the rest stays with the owner.

    latent <- latent + sum_k p_k (D(c_k) - D(c))        (p_k: site k's weight; D(c_k), D(c): what its codes stand for,
                                                         and those of the broadcast)

Codes are not averaged, for those of two sites have two lines. The latent values are in double precision and never
leave; what goes out are the codes and the line that err least from them. The difference is not lost, for the next
round's changes are added to the latent values (error feedback, arXiv 1809.07599). A tensor that nobody changes stays as
it is, bit for bit. What of a method has no codes is averaged by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from offsite.coordinator.aggregation.base import Origin, Sums, Version, joined
from offsite.coordinator.aggregation.mean import TensorMean
from offsite.kernels.bits import pack
from offsite.kernels.coded import Coded, decode, read, refit
from offsite.kernels.schema import Rule, Schema, TensorMap, Tensors, Tier, codes
from offsite.protos.documents import document

LATENT = "latent"


@document
class Requantise:
    """Average what codes stand for, and encode the mean."""

    name: ClassVar[str] = "requantise"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.REQUANTISE, Rule.MEAN, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    linear: ClassVar[bool] = False
    mixed_tiers: ClassVar[bool] = False
    needs: ClassVar[Literal["updates", "sum"]] = "updates"

    def begin(self, last: Version, schema: Schema) -> "_Fold":
        """Open a round on top of the last version's codes and the owner's latent values."""
        return _Fold(last, schema)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        version = joined(parts)
        return replace(version, figures=_figures(version.sums))


class _Fold:
    def __init__(self, last: Version, schema: Schema) -> None:
        self._schema, self._keys = schema, dict(sorted(codes(schema).items()))
        self._others = TensorMean({key: field for key, field in schema.items() if field.rule is not Rule.REQUANTISE})
        self._last = {group: self._read(last.adapter, group) for group in self._keys}
        self._values = {group: decode(one, self._width(group)) for group, one in self._last.items()}
        self._latent = {
            group: last.state.get(LATENT, {}).get(keys.codes, self._values[group]) for group, keys in self._keys.items()
        }
        self._moved = {group: torch.zeros_like(values) for group, values in self._values.items()}

    def _width(self, group: str) -> int:
        return self._schema[self._keys[group].codes].width

    def _read(self, tensors: TensorMap, group: str) -> Coded:
        keys = self._keys[group]
        field = self._schema[keys.codes]
        return read(tensors[keys.codes], tensors[keys.line], field.trained, field.width)

    def add(self, update: TensorMap, origin: Origin) -> None:
        self._others.add(update, origin)
        for group, moved in self._moved.items():
            values = decode(self._read(update, group), self._width(group))
            moved.add_(values - self._values[group], alpha=origin.weight)

    def finish(self, tiers: Iterable[Tier]) -> Version:
        adapter, latent, sums = Tensors(), Tensors(), Sums()
        for group, keys in self._keys.items():
            bits, moved, coded = self._width(group), self._moved.pop(group), self._last[group]
            whole = latent[keys.codes] = self._latent[group] + moved
            if bool(moved.any()):
                coded = refit(whole, coded, bits)
            adapter[keys.codes] = pack(coded.codes, bits)
            adapter[keys.line] = torch.tensor([coded.mean, coded.deviation])
            for name, values in ((LATENT, whole), ("rest", whole - decode(coded, bits))):
                sums.setdefault(name, {})[group] = float(values.square().sum())
        adapter |= self._others.finish(()).adapter
        state = {LATENT: latent} if latent else {}
        return Version(adapter, dict.fromkeys(tiers, adapter), state, _figures(sums), sums)


def _figures(sums: Sums) -> dict[str, float]:
    """Return the share of the latent values' norm that codes leave to the owner."""
    whole, rest = (sum(sums.get(name, {}).values()) for name in (LATENT, "rest"))
    return {"residual": (rest / whole) ** 0.5 if whole else 0.0} if sums else {}
