"""Products with matrices of 16 fixed levels, and a scale for every block of a row."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from offsite.kernels.gpu import packed as tiled
from offsite.kernels.gpu.packed import nibble


def multiply(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    levels: tuple[float, ...],
    *,
    d_in: int,
    block: int,
    transposed: bool = False,
) -> Tensor:
    """See `offsite.kernels.quantise.multiply`."""
    parts, numbers = (packed, scales, _table(levels, x.device)), (block, packed.shape[1], scales.shape[1])
    return tiled.product(_decode, x, bias, parts, numbers, d_out=len(packed), d_in=d_in, transposed=transposed)


@cache
def _table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the levels on a device, where they stay."""
    return torch.tensor(levels, device=device)


@triton.jit
def _decode(codes, scales, levels, n, k, inside, d_in, BLOCK: tl.constexpr, BYTES: tl.constexpr, BLOCKS: tl.constexpr):
    """Return entries of W: the level that a code names, times the scale of its block."""
    code = nibble(codes, n * (2 * BYTES) + k, inside)
    scale = tl.load(scales + n * BLOCKS + k // BLOCK, mask=inside, other=0.0).to(tl.float32)
    return tl.load(levels + code, mask=inside, other=0.0) * scale
