"""FedIT (arXiv 2305.05644): the means of A and of B, each by itself. A baseline, and biased.

The product of the means differs from the mean of the products by the covariance of the factors over the sites
(FedEx-LoRA, arXiv 2410.09432); use `low-rank` unless this bias is what you study.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from offsite.coordinator.aggregation.base import Version, joined
from offsite.coordinator.aggregation.mean import TensorMean
from offsite.kernels.schema import Rule, Schema
from offsite.protos.documents import document


@document
class FactorMean:
    """Average A and B apart; needs equal ranks."""

    name: ClassVar[str] = "factor-mean"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT, Rule.MEAN, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    linear: ClassVar[bool] = True
    mixed_tiers: ClassVar[bool] = False
    needs: ClassVar[Literal["updates", "sum"]] = "sum"

    def begin(self, last: Version, schema: Schema) -> TensorMean:
        """Open a round; nothing is kept of the last."""
        return TensorMean(schema)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        return joined(parts)
