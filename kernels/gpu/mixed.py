"""LoRA of several adapters: rows are sorted by adapter, and each tile of them multiplies by what one adapter has."""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from offsite.kernels.gpu import tiles

Starts = tuple[int, ...]


def shrink(x: Tensor, factors: Tensor, which: Tensor, starts: Starts) -> Tensor:
    """See `offsite.kernels.mixed.shrink`."""
    result = factors.new_zeros(len(x), _most(starts))
    _by_tile(x, factors, which, starts, result, transposed=False)
    return result


def expand(x: Tensor, factors: Tensor, which: Tensor, starts: Starts) -> Tensor:
    """See `offsite.kernels.mixed.expand`."""
    result = factors.new_zeros(len(x), factors.shape[1])
    _by_tile(x, factors, which, starts, result, transposed=True)
    return result


def outer(x: Tensor, y: Tensor, which: Tensor, starts: Starts) -> Tensor:
    """See `offsite.kernels.mixed.outer`."""
    result = x.new_zeros(starts[-1], y.shape[1])
    if x.numel() and result.numel():
        order, bounds = _sorted(which, starts)
        grid = len(starts) - 1, triton.cdiv(x.shape[1], tiles.ROWS), triton.cdiv(y.shape[1], tiles.COLUMNS)
        _outer[grid](
            *(x.contiguous(), y.contiguous(), result, order, bounds, _at(starts, x), x.shape[1], y.shape[1]),
            *(tiles.operand(x.dtype), tiles.precision(), tiles.ROWS, tiles.COLUMNS, tiles.DEPTH),
        )
    return result


def _by_tile(x: Tensor, factors: Tensor, which: Tensor, starts: Starts, result: Tensor, *, transposed: bool) -> None:
    """Fill a result (m, n), each tile of rows of one adapter.

    How many tiles there are is known on the GPU only: one more than full ones for each adapter is enough.
    """
    if not (x.numel() and result.numel()):
        return
    order, bounds = _sorted(which, starts)
    ends = (bounds.diff() + tiles.ROWS - 1).div(tiles.ROWS, rounding_mode="floor").cumsum(0)
    count = triton.cdiv(len(x), tiles.ROWS) + len(starts) - 1
    adapter = torch.searchsorted(ends, torch.arange(count, device=x.device), right=True)
    _multiply[(count, triton.cdiv(result.shape[1], tiles.COLUMNS))](
        *(x.contiguous(), factors.contiguous(), result, order, bounds, _at(starts, x), ends, adapter),
        *(len(starts) - 1, x.shape[1], result.shape[1], factors.shape[1], transposed),
        *(tiles.operand(factors.dtype), tiles.precision(), tiles.ROWS, tiles.COLUMNS, tiles.DEPTH),
    )


def _sorted(which: Tensor, starts: Starts) -> tuple[Tensor, Tensor]:
    """Return the rows sorted by adapter, and between which places (adapters + 1,) each adapter's are."""
    names, order = which.sort(stable=True)
    return order, torch.searchsorted(names, torch.arange(len(starts), device=which.device))


def _at(starts: Starts, like: Tensor) -> Tensor:
    return torch.tensor(starts, device=like.device)


def _most(starts: Starts) -> int:
    return max((stop - start for start, stop in pairwise(starts)), default=0)


@triton.jit
def _multiply(
    x,
    factors,
    result,
    order,
    bounds,
    starts,
    ends,
    adapters,
    count,
    width,
    columns_of_result,
    d,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Multiply the rows of one adapter by its factors F (r, d): x F', or x F if they are to be transposed."""
    tile = tl.program_id(0)
    adapter = tl.load(adapters + tile)
    if adapter < count:
        before = tl.load(ends + adapter - 1, mask=adapter > 0, other=0)
        place = tl.load(bounds + adapter) + (tile - before) * ROWS + tl.arange(0, ROWS)
        ours = place < tl.load(bounds + adapter + 1)
        rows = tl.load(order + place, mask=ours, other=0)
        first = tl.load(starts + adapter)
        rank = tl.load(starts + adapter + 1) - first
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        depth = rank if TRANSPOSED else d
        across = d if TRANSPOSED else rank
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            at = start + tl.arange(0, DEPTH)
            here = ours[:, None] & (at[None, :] < depth)
            values = tl.load(x + rows[:, None] * width + at[None, :], mask=here, other=0.0)
            there = (at[:, None] < depth) & (columns[None, :] < across)
            if TRANSPOSED:
                factor = tl.load(factors + (first + at[:, None]) * d + columns[None, :], mask=there, other=0.0)
            else:
                factor = tl.load(factors + (first + columns[None, :]) * d + at[:, None], mask=there, other=0.0)
            rounded = values.to(factor.dtype).to(OPERAND)
            total = tl.dot(rounded, factor.to(OPERAND), total, input_precision=PRECISION)
        inside = ours[:, None] & (columns[None, :] < across)
        output = result + rows[:, None] * columns_of_result + columns[None, :]
        tl.store(output, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _outer(
    x,
    y,
    result,
    order,
    bounds,
    starts,
    width,
    d,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sum a tile of x' y over the rows of one adapter."""
    adapter = tl.program_id(0)
    first = tl.load(starts + adapter)
    rank = tl.load(starts + adapter + 1) - first
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.load(bounds + adapter + 1)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(tl.load(bounds + adapter), last, DEPTH):
        place = start + tl.arange(0, DEPTH)
        rows = tl.load(order + place, mask=place < last, other=0)
        here = (at[:, None] < rank) & (place[None, :] < last)
        there = (place[:, None] < last) & (columns[None, :] < d)
        left = tl.load(x + rows[None, :] * width + at[:, None], mask=here, other=0.0)
        right = tl.load(y + rows[:, None] * d + columns[None, :], mask=there, other=0.0)
        total = tl.dot(left.to(OPERAND), right.to(left.dtype).to(OPERAND), total, input_precision=PRECISION)
    inside = (at[:, None] < rank) & (columns[None, :] < d)
    tl.store(result + (first + at[:, None]) * d + columns[None, :], total.to(result.dtype.element_ty), mask=inside)
