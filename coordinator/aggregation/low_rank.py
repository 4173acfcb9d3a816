"""Exact averaging of LoRA: the weighted mean of the products, not of the factors.

    dW* = sum_k p_k (E_k + B_k A_k)        (p_k: site k's weight; E_k: what the owner kept of its rank's broadcast)

The sum is held as stacked factors (FLoRA, arXiv 2409.05976) and, once these grow wider than the matrix, at the least
rank that holds it. Sites go on from the best approximation at their own rank (FlexLoRA, arXiv 2402.11505); the rest
stays with the owner and is in every plug-in. One site at full rank is passed through untouched, bit for bit.
"""

from typing import ClassVar

import torch

from offsite.coordinator.aggregation.base import Adapter, Aggregate, adapter, pairs
from offsite.kernels.low_rank import Pair, compress, distance, inner, split, stack
from offsite.protos.documents import document


@document
class LowRank:
    """Average products exactly; re-project to each site's rank by QR and SVD."""

    name: ClassVar[str] = "low-rank"
    kinds: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    mixed_ranks: ClassVar[bool] = True
    tolerance: float = 1e-7  # singular values below this share of the largest are dropped

    def begin(self, residual: dict[int, Adapter]) -> "_Fold":
        """Open a round on top of the residuals."""
        return _Fold(residual, tolerance=self.tolerance)


class _Fold:
    def __init__(self, residual: dict[int, Adapter], *, tolerance: float) -> None:
        self._residual = residual
        self._share: dict[int, float] = {}  # rank -> weight of the sites that trained at it
        self._products: dict[str, Pair] = {}
        self._factors: dict[str, Pair] = {}
        self._tolerance = tolerance

    def add(self, update: Adapter, *, weight: float) -> None:
        modules = pairs(update)
        rank = next(iter(modules.values()))[0].shape[1]
        self._share[rank] = self._share.get(rank, 0.0) + weight
        for module, (b, a) in modules.items():
            self._products[module] = self._grow(self._products.get(module), (weight * b, a))
            if len(self._share) == 1:  # the means of the factors exist only among equal ranks
                mean_b, mean_a = self._factors.get(module, (torch.zeros_like(b), torch.zeros_like(a)))
                self._factors[module] = (mean_b + weight * b, mean_a + weight * a)

    def _grow(self, held: Pair | None, pair: Pair) -> Pair:
        grown = pair if held is None else stack([held, pair])
        wide = grown[0].shape[1] > min(grown[0].shape[0], grown[1].shape[1])
        return compress(grown, tolerance=self._tolerance) if wide else grown

    def finish(self, ranks: list[int]) -> Aggregate:
        totals = dict(self._products)
        for rank, share in self._share.items():
            share = 1.0 if len(self._share) == 1 else share
            for module, (b, a) in pairs(self._residual.get(rank, {})).items():
                if b.shape[1]:
                    totals[module] = self._grow(totals[module], (share * b, a))
        broadcast: dict[int, dict[str, Pair]] = {rank: {} for rank in ranks}
        residual: dict[int, dict[str, Pair]] = {rank: {} for rank in ranks}
        for module, total in totals.items():
            for rank in ranks:
                if total[0].shape[1] == rank:
                    broadcast[rank][module], residual[rank][module] = total, (total[0][:, :0], total[1][:0])
                else:
                    broadcast[rank][module], residual[rank][module] = split(total, rank, tolerance=self._tolerance)
        return Aggregate(
            exact=adapter(totals),
            broadcast={rank: adapter(modules) for rank, modules in broadcast.items()},
            residual={rank: adapter(modules) for rank, modules in residual.items()},
            figures=self._figures(totals, residual[max(ranks)]),
        )

    def _figures(self, totals: dict[str, Pair], residual: dict[str, Pair]) -> dict[str, float]:
        """Say how far factor-by-factor averaging would have been off, and what re-projection left to the owner."""
        total = sum(inner(pair, pair) for pair in totals.values())
        kept = sum(inner(pair, pair) for pair in residual.values() if pair[0].shape[1])
        figures = {"residual": (kept / total) ** 0.5 if total else 0.0}
        if len(self._share) == 1:
            product = sum(inner(pair, pair) for pair in self._products.values())
            off = sum(distance(pair, self._factors[module]) ** 2 for module, pair in self._products.items())
            figures["factor_mean_error"] = (off / product) ** 0.5 if product else 0.0
        return figures
