"""The sum over the sites of what each has measured of its data: no weights, since a sum counts rows by itself.

    S = S_last + sum_k u_k        (u_k: the sums of site k's round)

A federation's sums are those of the pooled data, whoever holds which rows. Later rounds measure other rows, and add to
what is there. Sites begin every round from zeros: none of them is sent what others measured. What is fixed, such as an
adapter at which they measure, stays as it is. The sum is compensated, so that another order of the sites gives the same
version, bit for bit.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch

from offsite.coordinator.aggregation.base import Origin, Version, joined
from offsite.kernels.compensated import Compensated
from offsite.kernels.schema import Rule, Schema, TensorMap, Tier
from offsite.protos.documents import document
from offsite.protos.errors import InputError


@document
class Sum:
    """Add the tensors of all sites to those of the last version."""

    name: ClassVar[str] = "sum"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.SUM, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.SUM, Rule.FIXED})
    linear: ClassVar[bool] = False
    mixed_tiers: ClassVar[bool] = False
    needs: ClassVar[Literal["updates", "sum"]] = "sum"

    def begin(self, last: Version, schema: Schema) -> "_Fold":
        """Open a round on top of the last version's sums."""
        return _Fold(last, schema)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        return joined(parts)


class _Fold:
    def __init__(self, last: Version, schema: Schema) -> None:
        self._fixed = {key: last.adapter[key] for key, field in schema.items() if field.rule is Rule.FIXED}
        self._totals = {key: Compensated(last.adapter[key]) for key in schema.keys() - self._fixed.keys()}

    def add(self, update: TensorMap, origin: Origin) -> None:
        for key, tensor in self._fixed.items():
            if not torch.equal(tensor, update[key]):
                raise InputError(f"{key} is fixed, but another at {origin.site} than in the last version")
        for key, total in self._totals.items():
            try:
                total.add(update[key])
            except ValueError as error:
                raise InputError(f"{key} of {origin.site}: {error}") from error

    def finish(self, tiers: Iterable[Tier]) -> Version:
        sums = {key: total.value() for key, total in sorted(self._totals.items())}
        zeros = {key: torch.zeros_like(one) for key, one in sums.items()}
        return Version(adapter=self._fixed | sums, broadcast=dict.fromkeys(tiers, self._fixed | zeros))
