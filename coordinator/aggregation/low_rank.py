"""Exact averaging of LoRA: the weighted mean of the products, not of the factors.

    dW* = sum_k p_k (E_k + B_k A_k)        (p_k: site k's weight; E_k: what the owner kept of its tier's broadcast)

The sum is held as stacked factors (FLoRA, arXiv 2409.05976) and, once these grow wider than the matrix, as the matrix
in double precision: whether there are a hundred sites or ten thousand, the next one costs the same. Sites go on from
the best approximation at their own rank (FlexLoRA, arXiv 2402.11505); the rest stays with the owner and is in every
plug-in. One site at full rank is passed through untouched, bit for bit.
What of a method is no product is averaged by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from offsite.coordinator.aggregation.base import Origin, Sums, Version, joined
from offsite.coordinator.aggregation.mean import TensorMean
from offsite.kernels.low_rank import Pair, Total, inner, split
from offsite.kernels.schema import Factors, Rule, Schema, TensorMap, Tensors, Tier, factors
from offsite.protos.documents import document

Products = dict[str, Pair]  # by group: (B, A)


@document
class LowRank:
    """Average products exactly; re-project to each site's rank by QR and SVD."""

    name: ClassVar[str] = "low-rank"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT, Rule.MEAN, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT, Rule.MEAN, Rule.FIXED})
    linear: ClassVar[bool] = True
    mixed_tiers: ClassVar[bool] = True
    needs: ClassVar[Literal["updates", "sum"]] = "updates"
    tolerance: float = 1e-7  # singular values below this share of the largest are dropped

    def begin(self, last: Version, schema: Schema) -> "_Fold":
        """Open a round on top of what the last one left to the owner."""
        return _Fold(last, schema, tolerance=self.tolerance)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        version = joined(parts)
        return replace(version, figures=_figures(version.sums))


class _Fold:
    def __init__(self, last: Version, schema: Schema, *, tolerance: float) -> None:
        self._last = last
        self._keys = dict(sorted(factors(schema).items()))
        self._others = TensorMean({key: field for key, field in schema.items() if field.rule is not Rule.PRODUCT})
        self._share: dict[Tier, float] = {}  # weight of the sites that trained at it
        self._totals = {group: Total(tolerance=tolerance) for group in self._keys}
        self._tolerance = tolerance

    def add(self, update: TensorMap, origin: Origin) -> None:
        self._others.add(update, origin)
        self._share[origin.tier] = self._share.get(origin.tier, 0.0) + origin.weight
        for group, pair in self._keys.items():
            self._totals[group].add((update[pair.B], update[pair.A]), origin.weight)

    def finish(self, tiers: Iterable[Tier]) -> Version:
        sums = self._sums()
        for tier, share in self._share.items():
            share = 1.0 if len(self._share) == 1 else share
            for group, (b, a) in _products(self._last.state.get(_residual(tier), {}), self._keys).items():
                if b.shape[1]:
                    self._totals[group].add((share * b, a))
        ranks = {tier: self._ranks(tier) for tier in tiers}
        totals, sent, left = Products(), {tier: Products() for tier in ranks}, {tier: Products() for tier in ranks}
        for group in self._keys:
            total = self._totals.pop(group)  # one at a time, for its decomposition takes more memory than it does
            totals[group] = total.pair()
            for tier in ranks:
                sent[tier][group], left[tier][group] = self._project(total, totals[group], ranks[tier][group])
        others = self._others.finish(()).adapter
        sums["all"] = {group: inner(pair, pair) for group, pair in totals.items()}
        for tier in ranks:
            sums[f"rank {tier}"] = {group: float(rank) for group, rank in ranks[tier].items()}
            sums[f"kept {tier}"] = {
                group: inner(pair, pair) if pair[0].shape[1] else 0.0 for group, pair in left[tier].items()
            }
        broadcast = {tier: others | _tensors(products, self._keys) for tier, products in sent.items()}
        state = {_residual(tier): _tensors(products, self._keys) for tier, products in left.items() if products}
        return Version(others | _tensors(totals, self._keys), broadcast, state, _figures(sums), sums)

    def _ranks(self, tier: Tier) -> dict[str, int]:
        return {group: b.shape[1] for group, (b, _) in _products(self._last.broadcast[tier], self._keys).items()}

    def _project(self, total: Total, pair: Pair, rank: int) -> tuple[Pair, Pair]:
        """Return the best approximation at a rank, and what it leaves out."""
        if pair[0].shape[1] == rank:
            return pair, (pair[0][:, :0], pair[1][:0])
        return split(pair, rank, tolerance=self._tolerance, svd=total.svd())

    def _sums(self) -> Sums:
        """Return how far factor-by-factor averaging would have been off; only equal ranks can be averaged so."""
        if len(self._share) > 1:
            return {}
        return {
            "product": {group: total.square() for group, total in self._totals.items()},
            "off": {group: total.distance(total.factors()) ** 2 for group, total in self._totals.items()},
        }


def _figures(sums: Sums) -> dict[str, float]:
    """Return what an average factor by factor would have missed, and what re-projection leaves to the owner.

    The latter is told of the tier of the largest ranks. Where ranks differ, the share of the mean's energy (its squared
    Frobenius norm) that no site of the smallest rank can hold is told, too: an average of what each site can hold
    would lose it round by round.
    """
    total = {name: sum(values.values()) for name, values in sums.items()}
    tiers = sorted(name.removeprefix("rank ") for name in total if name.startswith("rank "))
    smallest, largest = (pick(tiers, key=lambda tier: total[f"rank {tier}"]) for pick in (min, max))
    shares = {"factor_mean_error": ("off", "product"), "residual": (f"kept {largest}", "all")}
    figures = {
        figure: (total[part] / total[whole]) ** 0.5 if total[whole] else 0.0
        for figure, (part, whole) in shares.items()
        if part in total
    }
    if total[f"rank {smallest}"] < total[f"rank {largest}"]:
        figures["energy_above_smallest_rank"] = total[f"kept {smallest}"] / total["all"] if total["all"] else 0.0
    return figures


def _residual(tier: Tier) -> str:
    return f"residual.{tier}"


def _products(adapter: Tensors, keys: dict[str, Factors]) -> Products:
    """Return the factors (B, A) of each group that an adapter has."""
    return {group: (adapter[pair.B], adapter[pair.A]) for group, pair in keys.items() if pair.A in adapter}


def _tensors(products: Products, keys: dict[str, Factors]) -> Tensors:
    """Return the tensors that products are made of."""
    return {keys[group][at]: factor for group, pair in products.items() for at, factor in enumerate(pair)}
