"""Factors that LoRA starts from, made of a map's weights: W + scale * (B A - B0 A0), with B = B0 and A = A0 at first.

The base stays as it is. peft takes B0 A0 off the weights instead, which rounds them, and which no emulator in few bits
could do.
Both ends of a run make these factors, the site to see that nobody made up others. So W is rounded to bf16 first, the
fewest digits that a site may have of it, and the rest is done in fp64: two machines differ in the last digits alone.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from offsite.emulator.methods.base import Factors
from offsite.emulator.seeds import generator

Init = Literal["random", "pissa", "olora"]

ITERATIONS = 16  # those of the paper's fast SVD
SPARE = 8  # columns beside the rank, which bring the others nearer to the singular vectors (Halko et al., 0909.4061)
NOTHING = 1e-7  # share of the largest singular value below which there is none


def principal(W: Tensor, rank: int, scale: float) -> Factors:
    """Return the largest part of W, scale * B A, each factor with the roots (PiSSA, Meng et al., arXiv 2404.02948).

    Where W has no more singular values, B is zero and A random, as in any LoRA. W is (d_out, d_in); the cost is that of
    about 2 * ITERATIONS products of W with `rank` columns, which are drawn from one seed in all runs.
    """
    W = rounded(W)
    random = generator(0, "pissa")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random.initial_seed())
        U, S, V = torch.svd_lowrank(W, min(rank + SPARE, *W.shape), niter=ITERATIONS)
    U, S, V = U[:, :rank], S[:rank], V[:, :rank]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # the one that a decomposition leaves open
    root = torch.where(S > NOTHING * S[0], S / scale, torch.zeros_like(S)).sqrt()
    fresh = torch.empty(rank, W.shape[1], dtype=W.dtype).uniform_(-1, 1, generator=random) * W.shape[1] ** -0.5
    A = torch.where(root[:, None] > 0, root[:, None] * (V * sign).T, fresh)
    return Factors(A.float().contiguous(), (U * sign * root).float().contiguous())


def orthonormal(W: Tensor, rank: int, scale: float) -> Factors:
    """Return the first columns of Q and rows of R, of W = Q R (OLoRA, Büyükakyüz, arXiv 2406.01775).

    They do not depend on the scale. W is (d_out, d_in).
    """
    W = rounded(W)
    Q, R = torch.linalg.qr(W[:, :rank])
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(W.dtype)
    Q = Q * sign
    return Factors((Q.T @ W).float().contiguous(), Q.float().contiguous())


INITS: dict[str, Callable[[Tensor, int, float], Factors]] = {
    "pissa": principal,
    "olora": orthonormal,
}


def rounded(W: Tensor) -> Tensor:
    """Return a matrix in fp64 and on the CPU, rounded to bf16, as coarse as any copy of it is."""
    return W.detach().to("cpu", torch.bfloat16).double()
