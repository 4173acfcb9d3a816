"""FedAvg (McMahan et al., arXiv 1602.05629): the weighted mean of every tensor.

Exact for methods whose tensors enter the weights linearly, such as the grids of a common sketch; the usual
approximation for whole layers.
"""

from typing import ClassVar

from offsite.coordinator.aggregation.base import Adapter, Aggregate
from offsite.protos.documents import document
from offsite.protos.errors import InputError


@document
class Mean:
    """Average every tensor by itself."""

    name: ClassVar[str] = "mean"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    mixed_ranks: ClassVar[bool] = False

    def begin(self, residual: dict[int, Adapter]) -> "TensorMean":
        """Open a round; there is never a residual."""
        return TensorMean()


class TensorMean:
    """The running mean of tensors by name; raises InputError if their shapes differ from site to site."""

    def __init__(self) -> None:
        self._mean: Adapter = {}

    def add(self, update: Adapter, *, weight: float) -> None:
        """Take one site's adapter."""
        for key, tensor in update.items():
            if key in self._mean and self._mean[key].shape != tensor.shape:  # torch would broadcast a rank of 1
                raise InputError(f"a mean needs equal shapes, {key} has {list(tensor.shape)} at a site; use low-rank")
            self._mean[key] = self._mean[key] + weight * tensor if key in self._mean else weight * tensor

    def finish(self, ranks: list[int]) -> Aggregate:
        """Close the round."""
        return Aggregate(exact=self._mean, broadcast={rank: self._mean for rank in ranks}, residual={})
