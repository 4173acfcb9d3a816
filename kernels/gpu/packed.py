"""Products with matrices in few bits: each tile of a matrix is made from its codes where it is multiplied.

A kind of code is a Triton function `decode(first, second, third, n, k, inside, d_in, A, B, C)` that returns entries
[n, k] of W (d_out, d_in) in fp32, given the addresses of what W is stored as and three numbers known to the compiler.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from offsite.kernels.gpu import tiles


def product(
    decode: Any,
    x: Tensor,
    bias: Tensor | None,
    parts: Sequence[Tensor],
    numbers: Sequence[int],
    *,
    d_out: int,
    d_in: int,
    transposed: bool,
) -> Tensor:
    """Return what `offsite.kernels.quantise.product` does, of a matrix that `decode` reads off three parts."""
    rows, width = tiles.flat(x), d_in if transposed else d_out
    result = rows.new_empty(len(rows), width)
    added = None if bias is None else bias.to(x.dtype).contiguous()
    if result.numel():
        _multiply[tiles.grid(*result.shape)](
            *(rows, result, added, *(part.contiguous() for part in parts), len(rows), d_out, d_in),
            *(decode, *numbers, transposed, tiles.operand(x.dtype), tiles.precision()),
            *(tiles.ROWS, tiles.COLUMNS, tiles.DEPTH),
        )
    return result.view(*x.shape[:-1], width)


@triton.jit
def _multiply(
    x,
    result,
    bias,
    first,
    second,
    third,
    count,
    d_out,
    d_in,
    DECODE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Make a tile of the result (count, d_out), or (count, d_in) of the transposed matrix."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = d_in if TRANSPOSED else d_out
    depth = d_out if TRANSPOSED else d_in
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + tl.arange(0, DEPTH)
        here = (rows[:, None] < count) & (at[None, :] < depth)
        values = tl.load(x + rows[:, None] * depth + at[None, :], mask=here, other=0.0)
        there = (at[:, None] < depth) & (columns[None, :] < width)
        if TRANSPOSED:
            weight = DECODE(first, second, third, at[:, None].to(tl.int64), columns[None, :], there, d_in, A, B, C)
        else:
            weight = DECODE(first, second, third, columns[None, :].to(tl.int64), at[:, None], there, d_in, A, B, C)
        total = tl.dot(values.to(OPERAND), weight.to(values.dtype).to(OPERAND), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    tl.store(result + rows[:, None] * width + columns[None, :], total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def nibble(codes, at, inside):
    """Return the 4-bit codes at some positions of packed ones, the first of a byte in its lower half."""
    byte = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
    return (byte >> ((at % 2) * 4).to(tl.int32)) & 15
