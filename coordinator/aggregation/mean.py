"""FedAvg (McMahan et al., arXiv 1602.05629): the weighted mean of every tensor.

Exact for methods of which the weights are linear in the tensors, as in whole layers or the grids of a common sketch:
the mean of the adapters is that of the weights. For others, such as bottlenecks, it is the usual approximation.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch

from offsite.coordinator.aggregation.base import Origin, Version, joined
from offsite.kernels.schema import Rule, Schema, TensorMap, Tensors, Tier
from offsite.protos.documents import document
from offsite.protos.errors import InputError


@document
class Mean:
    """Average every tensor by itself."""

    name: ClassVar[str] = "mean"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    mixed_tiers: ClassVar[bool] = False
    needs: ClassVar[Literal["updates", "sum"]] = "sum"

    def begin(self, last: Version, schema: Schema) -> "TensorMean":
        """Open a round; nothing is kept of the last."""
        return TensorMean(schema)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        return joined(parts)


class TensorMean:
    """The running mean of tensors by name; those that are fixed stay as they are."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._mean: Tensors = {}

    def add(self, update: TensorMap, origin: Origin) -> None:
        """Take one site's tensors of the schema; raises InputError if they differ in shape, or where they may not."""
        for key, field in self._schema.items():
            tensor, mean = update[key], self._mean.get(key)
            if mean is not None and mean.shape != tensor.shape:  # torch would broadcast a size of 1
                raise InputError(
                    f"a mean needs equal shapes, {key} is {list(tensor.shape)} at {origin.site} and {list(mean.shape)} "
                    "at others; use a strategy for sites of mixed tiers"
                )
            if field.rule is Rule.FIXED:
                if mean is not None and not torch.equal(mean, tensor):
                    raise InputError(f"{key} is fixed, but another at {origin.site} than at others")
                self._mean[key] = tensor
            else:
                share = origin.weight * tensor
                self._mean[key] = share if mean is None else mean.add_(share)

    def finish(self, tiers: Iterable[Tier]) -> Version:
        """Close the round."""
        return Version(adapter=self._mean, broadcast=dict.fromkeys(tiers, self._mean))
