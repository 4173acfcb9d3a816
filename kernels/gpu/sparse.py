"""Products with matrices of few entries, for which no matrix is made: each entry is read where it is needed.

What is multiplied is laid out as (d, m), so that what an entry reads lies together. Each number is the sum of its terms
in one order, whatever runs beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offsite.kernels.gpu import tiles

Size = tuple[int, int]
_ENTRIES = 16  # of an index, taken at a time


def multiply(x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
    """See `offsite.kernels.sparse.multiply`."""
    d_out, d_in = size
    bounds = torch.arange(d_out + 1, device=index.device) * d_in
    starts = torch.searchsorted(index.long(), bounds)
    return _gathered(x, index % d_in, values, starts)


def multiply_transposed(x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
    """See `offsite.kernels.sparse.multiply_transposed`."""
    d_in = size[1]
    columns, order = (index.long() % d_in).sort(stable=True)
    starts = torch.searchsorted(columns, torch.arange(d_in + 1, device=index.device))
    return _gathered(x, index[order] // d_in, values[order], starts)


def at_entries(x: Tensor, of_output: Tensor, index: Tensor) -> Tensor:
    """See `offsite.kernels.sparse.at_entries`."""
    left, right = (tiles.flat(tensor).T.contiguous() for tensor in (of_output, x))
    result = left.new_empty(len(index))
    if len(index):
        _at_entries[(triton.cdiv(len(index), _ENTRIES),)](
            *(left, right, index, result, len(index), left.shape[1], right.shape[0], _ENTRIES, tiles.COLUMNS)
        )
    return result


def _gathered(x: Tensor, places: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """Return the sums (..., n) of the entries starts[i] to starts[i + 1], each a value times x[..., place]."""
    columns, count = tiles.flat(x).T.contiguous(), len(starts) - 1
    result = values.new_empty(count, columns.shape[1])
    if result.numel():
        _gather[(count, triton.cdiv(columns.shape[1], tiles.COLUMNS))](
            *(columns, places, values, starts, result, columns.shape[1], _ENTRIES, tiles.COLUMNS)
        )
    return result.T.reshape(*x.shape[:-1], count)


@triton.jit
def _gather(x, places, values, starts, result, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """Make a stretch of one row of the result (n, width) from the rows of x (d, width) that its entries name."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(first, last, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        place = tl.load(places + at, mask=at < last, other=0).to(tl.int64)
        value = tl.load(values + at, mask=at < last, other=0.0)
        inside = (at[:, None] < last) & (columns[None, :] < width)
        taken = tl.load(x + place[:, None] * width + columns[None, :], mask=inside, other=0.0)
        rounded = taken.to(value.dtype).to(tl.float32)
        total += tl.sum(value.to(tl.float32)[:, None] * rounded, axis=0)
    tl.store(result + row * width + columns, total.to(result.dtype.element_ty), mask=columns < width)


@triton.jit
def _at_entries(left, right, index, result, count, width, d_in, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """Make the products of a row of left (d_out, width) with one of right (d_in, width), at some of an index."""
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    place = tl.load(index + at, mask=at < count, other=0).to(tl.int64)
    total = tl.zeros((ENTRIES,), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (at[:, None] < count) & (columns[None, :] < width)
        row = tl.load(left + (place // d_in)[:, None] * width + columns[None, :], mask=inside, other=0.0)
        other = tl.load(right + (place % d_in)[:, None] * width + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(row.to(tl.float32) * other.to(row.dtype).to(tl.float32), axis=1)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=at < count)
