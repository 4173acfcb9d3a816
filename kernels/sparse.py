"""Algebra of matrices of which few entries are not zero, held as flat indices and their values.

Shapes: index (k,), integers that rise, row * d_in + column of a matrix (d_out, d_in); values (k,). What is as large as
the matrix lives only as long as one call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Size = tuple[int, int]  # (d_out, d_in)


def smallest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` smallest of values (n,) are, int64 and rising; of equal ones the first.

    Raises ValueError unless there are that many. What is smaller than what depends on no device and no thread.
    """
    if not 0 <= count <= len(values):
        raise ValueError(f"asked for the {count} smallest of {len(values)} values")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    limit = values.kthvalue(count).values
    below = (values < limit).nonzero().flatten()
    level = (values == limit).nonzero().flatten()[: count - len(below)]
    return torch.cat([below, level]).sort().values


def dense(index: Tensor, values: Tensor, size: Size) -> Tensor:
    """Return the matrix (d_out, d_in); values of one index twice are added."""
    return values.new_zeros(size[0] * size[1]).index_add(0, index, values).view(size)


def product(x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
    """Return D x (..., d_out) of x (..., d_in), in the values' dtype; differentiable in x and in the values.

    Between the two passes x, index and values are kept, and no matrix: on the way back one is made again, and the
    values' gradient is read off that of the matrix, which is let go before the next map's (SpIEL, arXiv 2401.16405).
    """
    result: Tensor = _Product.apply(x, index, values, size)  # type: ignore[no-untyped-call]
    return result


def gradient(x: Tensor, of_output: Tensor) -> Tensor:
    """Return the gradient (d_out, d_in) of a matrix, given its input (..., d_in) and the gradient of its output."""
    rows = of_output.reshape(-1, of_output.shape[-1])
    return rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
        ctx.size = size
        ctx.save_for_backward(x, index, values)
        return functional.linear(x.to(values.dtype), dense(index, values, size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        x, index, values = ctx.saved_tensors
        of_x = (of_output @ dense(index, values, ctx.size)).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_values = gradient(x, of_output).flatten().index_select(0, index) if ctx.needs_input_grad[2] else None
        return of_x, None, of_values, None
