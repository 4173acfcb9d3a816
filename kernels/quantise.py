"""Blockwise quantisation of matrices to 16 levels, and 4-bit codes as bytes.

A row of W (d_out, d_in) is cut into blocks of `block` entries, of which the last may be shorter; an entry is stored as
the number of one of 16 levels in [-1, 1], times the block's largest magnitude. Sources: NF4, QLoRA (arXiv 2305.14314,
section 3 and appendix E); symmetric rounding to nearest is the usual baseline.
"""

import torch
from torch import Tensor
from torch.nn import functional

from offsite.kernels.device import by_device

# Appendix E: the quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INT4_LEVELS = tuple(
    number / 7 for number in range(-8, 8)
)  # -8 keeps the codes those of an int4; no entry is below -7/7


def pack_nibbles(codes: Tensor) -> Tensor:
    """Store codes (..., n) in 0..15 two per byte, the first in the lower half: (..., ceil(n / 2)) uint8."""
    even = functional.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2))
    return even[..., 0::2] | even[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Return the `count` codes (..., count) uint8 of each row that `pack_nibbles` stored."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :count]


def quantise(weight: Tensor, levels: tuple[float, ...], *, block: int) -> tuple[Tensor, Tensor]:
    """Return packed codes (d_out, ceil(d_in / 2)) uint8 and scales (d_out, ceil(d_in / block)) fp16 of a matrix.

    Each entry takes the level nearest to it under its scale as stored; `levels` ascend. Raises ValueError if a scale
    is not finite in fp16.
    """
    d_out, d_in = weight.shape
    blocks = _in_blocks(weight.float(), block)
    scales = blocks.abs().amax(dim=-1).half()
    if not scales.isfinite().all():
        raise ValueError(
            f"a matrix ({d_out}, {d_in}) has an entry of magnitude {float(weight.abs().max()):g}, and fp16 scales "
            "reach 65504; this map cannot be quantised"
        )
    table = torch.tensor(levels, device=weight.device)
    # Under a scale of 0 everything decodes to 0, whatever its code; the least fp16 above it avoids 0 / 0.
    relative = blocks / scales.float().clamp(min=2.0**-24)[..., None]
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2, out_int32=True)
    return pack_nibbles(codes.view(d_out, -1)[:, :d_in]), scales


def dequantise(packed: Tensor, scales: Tensor, levels: tuple[float, ...], *, d_in: int, block: int) -> Tensor:
    """Return the matrix (d_out, d_in) fp32 that `quantise` stored."""
    table = torch.tensor(levels, device=packed.device)
    relative = table.index_select(0, unpack_nibbles(packed, d_in).flatten().int()).view(-1, d_in)
    blocks = _in_blocks(relative, block).mul_(scales.float()[..., None])
    return blocks.view(len(packed), -1)[:, :d_in].contiguous()


@by_device
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
    """Return `product` of x and the matrix (d_out, d_in) that `quantise` stored."""
    return product(x, bias, dequantise(packed, scales, levels, d_in=d_in, block=block), transposed=transposed)


def product(x: Tensor, bias: Tensor | None, weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Return W x + b (..., d_out) of x (..., d_in), or W' x of x (..., d_out), all rounded to x's dtype first."""
    weight = weight.to(x.dtype)
    return x @ weight if transposed else functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _in_blocks(matrix: Tensor, block: int) -> Tensor:
    """Return (rows, blocks, block), with zeros where the last block of a row is short."""
    block = min(block, matrix.shape[1])
    short = -matrix.shape[1] % block
    padded = functional.pad(matrix, (0, short)) if short else matrix
    return padded.view(len(matrix), -1, block)
