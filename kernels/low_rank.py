"""Algebra of matrices held as products `left @ right`, never formed densely.

Shapes: left (d_out, R), right (R, d_in). R is the held rank, S = min(R, d_out, d_in) the number of singular values.
Sources: stacking, FLoRA (arXiv 2409.05976); re-projection, FlexLoRA (arXiv 2402.11505) in the compact QR form of
HLoRA (arXiv 2503.00813). The cost is O(d R^2 + R^3) instead of the dense O(d^3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def stack(pairs: Sequence[Pair]) -> Pair:
    """Return the exact sum of products as one pair, whose rank is the sum of the ranks."""
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs], dim=0)


def decompose(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD (u (d_out, S), s (S), vh (S, d_in)) of a product, in float64."""
    left, right = (factor.double() for factor in pair)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T


def split(pair: Pair, rank: int, *, tolerance: float = 1e-7) -> tuple[Pair, Pair]:
    """Return (best rank-`rank` approximation, the rest), both in the pair's dtype.

    The approximation is optimal in the Frobenius norm (Eckart-Young) and is balanced: both factors carry the square
    root of the singular values, so that an optimiser sees factors of equal norm. Singular values under `tolerance`
    times the largest count as zero. Columns that are not needed are zero on the left and random on the right, as in a
    fresh LoRA: a pair of zeros would never get a gradient.
    """
    dtype = pair[0].dtype
    u, s, vh = decompose(pair)
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
    dtype = pair[0].dtype
    u, s, vh = decompose(pair)
    held = max(1, int((s > tolerance * s.max()).sum())) if len(s) else 0
    root = s[:held].sqrt()
    return (u[:, :held] * root).to(dtype), (root[:, None] * vh[:held]).to(dtype)


def inner(first: Pair, second: Pair) -> float:
    """Frobenius inner product of two products, through R x R Gram matrices."""
    (left1, right1), (left2, right2) = ((a.double(), b.double()) for a, b in (first, second))
    return float(((left1.T @ left2) * (right1 @ right2.T)).sum())


def distance(first: Pair, second: Pair) -> float:
    """Frobenius norm of the difference of two products."""
    difference = stack([first, (-second[0], second[1])])
    return float(decompose(difference)[1].square().sum().sqrt())
