"""Linear maps of which some columns or rows change: what is added to their output, and the gradients of that.

    columns: y + x[J] D'   (D: d_out x r)          rows: y, with y[J] + x D'   (D: r x d_in)

PaCA (Woo et al., arXiv 2503.01905), S2FT (Yang et al., arXiv 2412.06289). Between the two passes x[J] (..., r) is kept
for columns, in x's dtype, and x for rows; D is multiplied in its own dtype. Indices J (r,) are int64, each once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from offsite.kernels.device import by_device


def add_columns(y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> Tensor:
    """Return y (..., d_out) + x[..., index] change', given x (..., d_in); differentiable in y, x and the change."""
    result: Tensor = _Columns.apply(y, x, index, change)  # type: ignore[no-untyped-call]
    return result


def add_rows(y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> Tensor:
    """Return y (..., d_out) with x change' added at `index`, given x (..., d_in); differentiable as `add_columns`."""
    result: Tensor = _Rows.apply(y, x, index, change)  # type: ignore[no-untyped-call]
    return result


@by_device
def gather_multiply(y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return y + x[..., index] change' in y's dtype, and x[..., index], contiguous."""
    part = x[..., index]
    return y + functional.linear(part.to(change.dtype), change).to(y.dtype), part


@by_device
def multiply_scatter(y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> Tensor:
    """Return y with x change' added at the last dimension's `index`, in y's dtype."""
    return y.index_add(-1, index, functional.linear(x.to(change.dtype), change).to(y.dtype))


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> Tensor:
        result, part = gather_multiply(y, x, index, change)
        ctx.save_for_backward(part if ctx.needs_input_grad[3] else None, index, change)
        ctx.like = x.shape, x.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        (part, index, change), (size, dtype) = ctx.saved_tensors, ctx.like
        rows = of_output.to(change.dtype)
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = of_output.new_zeros(size, dtype=dtype).index_copy_(-1, index, (rows @ change).to(dtype))
        of_change = None if part is None else _outer(rows, part)
        return of_output, of_x, None, of_change


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, index: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, index, change)
        ctx.dtype = x.dtype
        return multiply_scatter(y, x, index, change)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        x, index, change = ctx.saved_tensors
        rows = of_output[..., index].to(change.dtype)
        of_x = (rows @ change).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return of_output, of_x, None, None if x is None else _outer(rows, x)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum (m, n) over all leading dimensions of left (..., m) times right (..., n), in left's dtype."""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1]).to(left.dtype)
