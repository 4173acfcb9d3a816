"""Factors that LoRA starts from, made of what sites have measured of a map: W + scale * (B A - B0 A0).

The owner alone makes them: sites are sent what they start from, in a run that goes on from the one that measured. As in
`methods.initial` W is rounded to bf16 first, and decompositions are in fp64.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from offsite.emulator.methods.base import Factors, Place
from offsite.emulator.methods.initial import rounded
from offsite.emulator.methods.sums import Statistics

Measured = Literal["corda", "corda-kpm", "eva", "lora-ga"]

DAMPING = 0.01  # of the mean of C's diagonal; doubled until the inverse is one
INVERSE = 0.05  # largest || C C^-1 - I ||
GAMMA = 16  # LoRA-GA's, of its published code


class Start(NamedTuple):
    """A start of this kind: what it takes, how many directions of a map a rank takes, and what makes it.

    `weights` tells whether it has parts of W in it.
    """

    takes: str
    weights: bool
    directions: int
    make: Callable[[Tensor, Statistics, Place, int, float], Factors]  # of W (d_out, d_in), with rank and scale


def damped(C: Tensor) -> tuple[Tensor, Tensor]:
    """Return C (d, d) with a multiple of I added to it that can be inverted, and the inverse, fp64.

    Raises ValueError if there is none, as of inputs that are all zero.
    """
    eye, step = torch.eye(len(C), dtype=C.dtype), DAMPING * float(C.diagonal().mean())
    if not step > 0:
        raise ValueError("inputs that are all zero tell nothing of a map's weights; leave it out of modules")
    while True:
        C = C + step * eye
        inverse = torch.linalg.inv(C)
        if float(torch.linalg.matrix_norm(C @ inverse - eye)) < INVERSE:
            return C, inverse
        step *= 2


def corda(W: Tensor, C: Tensor, rank: int, scale: float, *, smallest: bool) -> Factors:
    """Return the part of W with the largest or smallest effect on inputs of the second moment C (d_in, d_in).

    W C = U S V^T, W = U S (V^T C^-1), B = U S^1/2 and A = S^1/2 V^T C^-1 of the chosen directions (CorDA, Yang et al.,
    arXiv 2406.05223): the largest ones to learn what the inputs are of, the smallest to keep it. Of equal magnitude are
    `scale * B @ A` and the part of W.
    """
    C, inverse = damped(C)
    U, S, Vh = torch.linalg.svd(rounded(W) @ C, full_matrices=False)
    at = slice(len(S) - rank, None) if smallest else slice(rank)
    U, root, Vh = U[:, at], (S[at] / scale).sqrt(), Vh[at]
    sign = signs(U)
    return _fp32((sign * root)[:, None] * Vh @ inverse, U * sign * root)


def eva(W: Tensor, C: Tensor, rank: int) -> Factors:
    """Return A, the directions of most of the inputs' second moment C (d_in, d_in), and B of zeros.

    They are the right singular vectors of the inputs (EVA, Paischer et al., arXiv 2410.07170). Its redistribution of
    ranks over the maps is left to `rank_pattern`.
    """
    V = torch.linalg.eigh(C).eigenvectors.flip(1)[:, :rank]
    return _fp32((V * signs(V)).T, torch.zeros(W.shape[0], rank))


def lora_ga(gradient: Tensor, rank: int) -> Factors:
    """Return A = d_out^1/4 / gamma^1/2 V_1..r^T and B = d_out^1/4 / gamma^1/2 U_r+1..2r of a gradient (d_out, d_in).

    With these the first step of gradient descent changes W the most like one on W itself (LoRA-GA, Wang et al.,
    arXiv 2407.05000, theorem 3.1 and the stable scale).
    """
    U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    sign, factor = signs(U), gradient.shape[0] ** 0.25 / GAMMA**0.5
    return _fp32(factor * (sign[:, None] * Vh)[:rank], factor * (U * sign)[:, rank : 2 * rank])


def signs(U: Tensor) -> Tensor:
    """Return the signs (k,) that a decomposition leaves open, with which each column's largest entry is positive."""
    return U.gather(0, U.abs().argmax(0, keepdim=True)).sign().flatten()


def _fp32(A: Tensor, B: Tensor) -> Factors:
    return Factors(A.float().contiguous(), B.float().contiguous())


def _corda(*, smallest: bool) -> Callable[[Tensor, Statistics, Place, int, float], Factors]:
    return lambda W, of, place, rank, scale: corda(W, of.mean_outer(place), rank, scale, smallest=smallest)


STARTS: dict[str, Start] = {
    "corda": Start("inputs", True, 1, _corda(smallest=False)),
    "corda-kpm": Start("inputs", True, 1, _corda(smallest=True)),
    "eva": Start("inputs", False, 1, lambda W, of, place, rank, scale: eva(W, of.mean_outer(place), rank)),
    "lora-ga": Start(
        "gradients",
        False,
        2,
        lambda W, of, place, rank, scale: lora_ga(of.of_weight(place, "gradients", (W.shape[0], W.shape[1])), rank),
    ),
}
