"""Algebra of matrices held as products `left @ right`.

Shapes: left (d_out, R), right (R, d_in). R is the held rank, S = min(R, d_out, d_in) the number of singular values.
Sources: stacking, FLoRA (arXiv 2409.05976); re-projection, FlexLoRA (arXiv 2402.11505) in the compact QR form of
HLoRA (arXiv 2503.00813). The cost is O(d R^2 + R^3) instead of the dense O(d^3). Only a sum of so many products that
their factors are wider than the matrix itself is held as the matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Svd = tuple[Tensor, Tensor, Tensor]  # u (d_out, S), s (S), vh (S, d_in), thin, in float64

BLOCK = 256  # columns that wait to be multiplied into a dense sum together: one wide product is faster than many narrow


def stack(pairs: Sequence[Pair]) -> Pair:
    """Return the exact sum of products as one pair, whose rank is the sum of the ranks."""
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs], dim=0)


def decompose(pair: Pair) -> Svd:
    """Return the SVD of a product."""
    left, right = (factor.double() for factor in pair)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T


def split(pair: Pair, rank: int, *, tolerance: float = 1e-7, svd: Svd | None = None) -> tuple[Pair, Pair]:
    """Return (best rank-`rank` approximation, the rest), both in the pair's dtype; `svd` is the pair's, if it is known.

    The approximation is optimal in the Frobenius norm (Eckart-Young) and is balanced: both factors carry the square
    root of the singular values, so that an optimiser sees factors of equal norm. Singular values under `tolerance`
    times the largest count as zero. Columns that are not needed are zero on the left and random on the right, as in a
    fresh LoRA: a pair of zeros would never get a gradient.
    """
    dtype = pair[0].dtype
    u, s, vh = svd or decompose(pair)
    root = s.sqrt()
    left, right = u * root, root[:, None] * vh
    held = int((s > tolerance * s.max()).sum()) if len(s) and s.max() > 0 else 0
    used, d_in = min(rank, held), right.shape[1]
    spare = torch.empty(rank - used, d_in, dtype=right.dtype)
    spare.uniform_(-(d_in**-0.5), d_in**-0.5, generator=torch.Generator().manual_seed(rank))
    near = (
        torch.nn.functional.pad(left[:, :used], (0, rank - used)).to(dtype),
        torch.cat([right[:used], spare.to(right.device)]).to(dtype),
    )
    return near, (left[:, used:held].to(dtype), right[used:held].to(dtype))


def compress(pair: Pair, *, tolerance: float = 1e-7) -> Pair:
    """Return the same product at the least rank that holds it to the tolerance."""
    return _balanced(*decompose(pair), tolerance=tolerance, dtype=pair[0].dtype)


def inner(first: Pair, second: Pair) -> float:
    """Frobenius inner product of two products, through R x R Gram matrices."""
    (left1, right1), (left2, right2) = ((a.double(), b.double()) for a, b in (first, second))
    return float(((left1.T @ left2) * (right1 @ right2.T)).sum())


def distance(first: Pair, second: Pair) -> float:
    """Frobenius norm of the difference of two products."""
    difference = stack([first, (-second[0], second[1])])
    return float(decompose(difference)[1].square().sum().sqrt())


class Total:
    """A running weighted sum of products: their factors, or the matrix once these are wider than it.

    The matrix is held in float64 then, at most twice the memory of the factors that it replaces, and the cost of one
    more product no longer depends on how many there were.
    """

    def __init__(self, *, tolerance: float = 1e-7) -> None:
        """Begin with nothing; `tolerance` is that of `compress`."""
        self._waiting: list[tuple[Pair, float]] = []  # with their weights
        self._pair: Pair | None = None
        self._width = 0  # of all that is held as factors
        self._dense: Tensor | None = None
        self._svd: Svd | None = None
        self._factors: Pair | None = None
        self._even = True  # whether all have had one rank
        self._tolerance = tolerance

    def add(self, pair: Pair, weight: float = 1.0) -> None:
        """Add a product, times a weight."""
        self._svd = None
        self._waiting.append((pair, weight))
        self._width += pair[0].shape[1]
        if self._width > (BLOCK if self._dense is not None else min(pair[0].shape[0], pair[1].shape[1])):
            self._multiply()

    def _stack(self) -> Pair | None:
        """Put what waits beside what is held as factors, and return that."""
        if self._waiting:
            pairs, weights = [pair for pair, _ in self._waiting], [weight for _, weight in self._waiting]
            self._waiting = []
            left, right = pairs[0] if len(pairs) == 1 else stack(pairs)
            ranks = [pair[0].shape[1] for pair in pairs]
            exact = torch.promote_types(left.dtype, torch.float32)  # 16 bits would round the weights
            scale = torch.tensor(weights, dtype=exact, device=left.device)
            if any(weight != 1.0 for weight in weights):
                left = (left * scale.repeat_interleave(torch.tensor(ranks, device=left.device))).to(left.dtype)
            self._add_factors(left, right, {*ranks}, scale.to(left.dtype))
            self._pair = (left, right) if self._pair is None else stack([self._pair, (left, right)])
        return self._pair

    def _add_factors(self, left: Tensor, right: Tensor, ranks: set[int], weights: Tensor) -> None:
        """Add to the sums of the factors, if all have one rank; the left ones are weighted already."""
        ranks = ranks if self._factors is None else ranks | {self._factors[0].shape[1]}
        self._even = self._even and len(ranks) == 1
        if self._even:
            count, (rank,) = len(weights), ranks
            lefts = left.reshape(len(left), count, rank).sum(1)
            rights = (weights @ right.reshape(count, -1)).view(rank, -1)
            before = self._factors or (torch.zeros_like(lefts), torch.zeros_like(rights))
            self._factors = before[0] + lefts, before[1] + rights

    def _multiply(self) -> Tensor:
        """Bring what is held as factors into the matrix, and return that."""
        if (pair := self._stack()) is not None:
            left, right = pair
            self._dtype = left.dtype
            if self._dense is None:
                self._dense = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float64, device=left.device)
            self._dense += left @ right  # of a block in the factors' precision, which is that of the outcome
            self._pair, self._width = None, 0
        assert self._dense is not None, "something was added"
        return self._dense

    def pair(self) -> Pair:
        """Return the sum as one product, of the least rank that holds it if it is held as a matrix."""
        if self._dense is None:
            pair = self._stack()
            assert pair is not None, "something was added"
            return pair
        return _balanced(*self.svd(), tolerance=self._tolerance, dtype=self._dtype)

    def svd(self) -> Svd:
        """Return the SVD of the sum."""
        if self._svd is None:
            dense = self._dense is not None
            u, s, vh = torch.linalg.svd(self._multiply(), full_matrices=False) if dense else decompose(self.pair())
            self._svd = u, s, vh
        return self._svd

    def factors(self) -> Pair:
        """Return the sums of the lefts and of the rights, each by itself, of products of one rank."""
        self._stack()
        assert self._even and self._factors is not None, "all that was added has one rank"
        return self._factors

    def square(self) -> float:
        """Return the square of the Frobenius norm."""
        if self._dense is None:
            return inner(self.pair(), self.pair())
        return float(self._multiply().square().sum())

    def distance(self, pair: Pair) -> float:
        """Return the Frobenius norm of the difference to a product."""
        if self._dense is None:
            return distance(self.pair(), pair)
        return float((self._multiply() - pair[0].double() @ pair[1].double()).norm())


def _balanced(u: Tensor, s: Tensor, vh: Tensor, *, tolerance: float, dtype: torch.dtype) -> Pair:
    """Return a thin SVD as two factors of equal norm, without the singular values that count as zero."""
    held = max(1, int((s > tolerance * s.max()).sum())) if len(s) else 0
    root = s[:held].sqrt()
    return (u[:, :held] * root).to(dtype), (root[:, None] * vh[:held]).to(dtype)
