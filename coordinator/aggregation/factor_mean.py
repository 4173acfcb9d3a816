"""FedIT (arXiv 2305.05644): the means of A and of B, each by itself. A baseline, and biased.

The product of the means differs from the mean of the products by the covariance of the factors over the sites
(FedEx-LoRA, arXiv 2410.09432); use `low-rank` unless this bias is what you study.
"""

from typing import ClassVar

from offsite.coordinator.aggregation.base import Adapter
from offsite.coordinator.aggregation.mean import TensorMean
from offsite.protos.documents import document


@document
class FactorMean:
    """Average A and B apart; needs equal ranks."""

    name: ClassVar[str] = "factor-mean"
    kinds: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    mixed_ranks: ClassVar[bool] = False

    def begin(self, residual: dict[int, Adapter]) -> TensorMean:
        """Open a round; there is never a residual."""
        return TensorMean()
