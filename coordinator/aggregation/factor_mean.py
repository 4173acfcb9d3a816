"""FedIT (arXiv 2305.05644): the means of A and of B, each by itself. A baseline, and biased.

The product of the means differs from the mean of the products by the covariance of the factors over the sites
(FedEx-LoRA, arXiv 2410.09432); use `low-rank` unless this bias is what you study.
"""

from typing import ClassVar

from offsite.coordinator.aggregation.base import Adapter, Aggregate
from offsite.protos.documents import document
from offsite.protos.errors import InputError


@document
class FactorMean:
    """Average A and B apart; needs equal ranks."""

    name: ClassVar[str] = "factor-mean"
    kinds: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    mixed_ranks: ClassVar[bool] = False

    def begin(self, residual: dict[int, Adapter]) -> "_Fold":
        """Open a round; there is never a residual."""
        return _Fold()


class _Fold:
    def __init__(self) -> None:
        self._mean: Adapter = {}

    def add(self, update: Adapter, *, weight: float) -> None:
        for key, tensor in update.items():
            if key in self._mean and self._mean[key].shape != tensor.shape:  # torch would broadcast a rank of 1
                raise InputError(f"factor-mean needs equal ranks, {key} has {list(tensor.shape)}; use low-rank")
            self._mean[key] = self._mean[key] + weight * tensor if key in self._mean else weight * tensor

    def finish(self, ranks: list[int]) -> Aggregate:
        return Aggregate(exact=self._mean, broadcast={rank: self._mean for rank in ranks}, residual={})
