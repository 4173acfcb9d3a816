"""Products with some columns or rows in one pass over the output: nothing of its size is written in between."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offsite.kernels.gpu import tiles


def gather_multiply(y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """See `offsite.kernels.partial.gather_multiply`."""
    base, rows, change = tiles.flat(y), tiles.flat(x), change.contiguous()
    result, part = torch.empty_like(base), rows.new_empty(len(rows), len(index))
    if base.numel():
        _gather_multiply[tiles.grid(*base.shape)](
            *(base, rows, index, change, result, part, len(rows), *change.shape, rows.shape[1]),
            *(tiles.operand(change.dtype), tiles.precision(), tiles.ROWS, tiles.COLUMNS, tiles.DEPTH),
        )
    return result.view(y.shape), part.view(*x.shape[:-1], len(index))


def multiply_scatter(y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> Tensor:
    """See `offsite.kernels.partial.multiply_scatter`."""
    result, rows, change = y.clone(memory_format=torch.contiguous_format), tiles.flat(x), change.contiguous()
    if rows.numel() and len(index):
        _multiply_scatter[tiles.grid(len(rows), len(index))](
            *(result, rows, index, change, len(rows), *change.shape, y.shape[-1]),
            *(tiles.operand(change.dtype), tiles.precision(), tiles.ROWS, tiles.COLUMNS, tiles.DEPTH),
        )
    return result


@triton.jit
def _gather_multiply(
    y,
    x,
    index,
    change,
    result,
    part,
    count,
    d_out,
    rank,
    d_in,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Make a tile of the result (count, d_out); the tiles of the first columns write part (count, rank), too."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, DEPTH):
        at = start + tl.arange(0, DEPTH)
        here = (rows[:, None] < count) & (at[None, :] < rank)
        places = tl.load(index + at, mask=at < rank, other=0)
        values = tl.load(x + rows[:, None] * d_in + places[None, :], mask=here, other=0.0)
        if tl.program_id(1) == 0:
            tl.store(part + rows[:, None] * rank + at[None, :], values, mask=here)
        there = (columns[None, :] < d_out) & (at[:, None] < rank)
        factor = tl.load(change + columns[None, :] * rank + at[:, None], mask=there, other=0.0)
        total = tl.dot(values.to(factor.dtype).to(OPERAND), factor.to(OPERAND), total, input_precision=PRECISION)
    inside = (rows[:, None] < count) & (columns[None, :] < d_out)
    output = rows[:, None] * d_out + columns[None, :]
    before = tl.load(y + output, mask=inside, other=0.0)
    tl.store(result + output, tiles.add(before, total), mask=inside)


@triton.jit
def _multiply_scatter(
    y,
    x,
    index,
    change,
    count,
    rank,
    d_in,
    d_out,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add a tile of x change' (count, rank) to the columns of y (count, d_out) that the index names, in place."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, d_in, DEPTH):
        at = start + tl.arange(0, DEPTH)
        here = (rows[:, None] < count) & (at[None, :] < d_in)
        there = (columns[None, :] < rank) & (at[:, None] < d_in)
        factor = tl.load(change + columns[None, :] * d_in + at[:, None], mask=there, other=0.0)
        values = tl.load(x + rows[:, None] * d_in + at[None, :], mask=here, other=0.0)
        total = tl.dot(values.to(factor.dtype).to(OPERAND), factor.to(OPERAND), total, input_precision=PRECISION)
    inside = (rows[:, None] < count) & (columns[None, :] < rank)
    output = rows[:, None] * d_out + tl.load(index + columns, mask=columns < rank, other=0)[None, :]
    before = tl.load(y + output, mask=inside, other=0.0)
    tl.store(y + output, tiles.add(before, total), mask=inside)
