"""Algebra of matrices of which few entries are not zero, held as flat indices and their values.

Shapes: index (k,), integers that rise, row * d_in + column of a matrix (d_out, d_in); values (k,). What is as large as
the matrix lives only as long as one call.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from offsite.kernels.compensated import two_sum
from offsite.kernels.device import by_device

Size = tuple[int, int]  # (d_out, d_in)


class Vector(NamedTuple):
    """The entries of a sparse matrix: at (k,), integers that rise, and values (k,)."""

    at: Tensor
    values: Tensor


def smallest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` smallest of values (n,) are, int64 and rising; of equal ones the first.

    Raises ValueError unless there are that many. What is smaller than what depends on no device and no thread.
    """
    if not 0 <= count <= len(values):
        raise ValueError(f"asked for the {count} smallest of {len(values)} values")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    limit = values.topk(count, largest=False, sorted=False).values.max()
    below = (values < limit).nonzero().flatten()
    level = (values == limit).nonzero().flatten()[: count - len(below)]
    return torch.cat([below, level]).sort().values


def largest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` values (n,) of the largest magnitude are, as `smallest` does."""
    return smallest(-values.abs(), count)


def dense(index: Tensor, values: Tensor, size: Size) -> Tensor:
    """Return the matrix (d_out, d_in); values of one index twice are added."""
    return values.new_zeros(size[0] * size[1]).index_add(0, index, values).view(size)


def product(x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
    """Return D x (..., d_out) of x (..., d_in), in the values' dtype; differentiable in x and in the values.

    Between the two passes x, index and values are kept, and no matrix. The reference makes one again on the way back,
    and reads the values' gradient off that of the matrix, which is let go before the next map's (SpIEL, arXiv
    2401.16405).
    """
    result: Tensor = _Product.apply(x, index, values, size)  # type: ignore[no-untyped-call]
    return result


def gradient(x: Tensor, of_output: Tensor) -> Tensor:
    """Return the gradient (d_out, d_in) of a matrix, given its input (..., d_in) and the gradient of its output."""
    rows = of_output.reshape(-1, of_output.shape[-1])
    return rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype)


def distance(first: Vector, second: Vector) -> float:
    """Frobenius norm of the difference of two matrices; raises ValueError where an index does not rise."""
    total = Total()
    total.add(first)
    total.add(second, -1.0)
    return float(total.sum().norm())


class Total:
    """A running weighted sum of sparse matrices, over the union of their entries.

    The sum of each entry is compensated (Neumaier, 1974): two doubles hold it, so that what it rounds to does not
    depend on the order. That is so as long as the terms of an entry are not 2^50 times apart, of which fp32 would not
    tell the smaller.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._index = torch.empty(0, dtype=torch.int64)
        self._sum, self._lost = (torch.empty(0, dtype=torch.float64) for _ in range(2))
        self._types: tuple[torch.dtype, torch.dtype] | None = None

    def add(self, vector: Vector, weight: float = 1.0) -> None:
        """Add a matrix, times a weight; raises ValueError if its index does not rise."""
        index, values = vector
        self._types = self._types or (index.dtype, values.dtype)
        index = index.long()
        if bool((index.diff() < 1).any()):
            raise ValueError("an index names an entry twice, or not in order: expected integers that rise")
        at = self._places(index)
        self._sum[at], lost = two_sum(self._sum[at], weight * values.double())
        self._lost[at] += lost

    def _places(self, index: Tensor) -> Tensor:
        """Return where the entries of an index are in the union, which has all of them then."""
        at = torch.searchsorted(self._index, index)
        known = at < len(self._index)
        known[known.clone()] = self._index[at[known]] == index[known]
        if not bool(known.all()):
            new = index[~known]
            union = torch.empty(len(self._index) + len(new), dtype=torch.int64)
            old_at = torch.arange(len(self._index)) + torch.searchsorted(new, self._index)
            new_at = torch.arange(len(new)) + torch.searchsorted(self._index, new)
            union[old_at], union[new_at] = self._index, new
            for name in ("_sum", "_lost"):
                wider = torch.zeros(len(union), dtype=torch.float64)
                wider[old_at] = getattr(self, name)
                setattr(self, name, wider)
            self._index = union
            at = torch.searchsorted(union, index)
        return at

    def sum(self) -> Tensor:
        """Return the values of the union's entries in fp64."""
        return self._sum + self._lost

    def vector(self) -> Vector:
        """Return the sum, in the dtypes of what was added first."""
        assert self._types is not None, "something was added"
        return Vector(self._index.to(self._types[0]), self.sum().to(self._types[1]))


@by_device
def multiply(x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
    """Return D x (..., d_out) of x (..., d_in), in the values' dtype."""
    return functional.linear(x.to(values.dtype), dense(index, values, size))


@by_device
def multiply_transposed(x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
    """Return D' x (..., d_in) of x (..., d_out), in the values' dtype."""
    return x.to(values.dtype) @ dense(index, values, size)


@by_device
def at_entries(x: Tensor, of_output: Tensor, index: Tensor) -> Tensor:
    """Return the gradient (k,) of a matrix's entries, given its input and the gradient of its output, in its dtype."""
    return gradient(x, of_output).flatten().index_select(0, index)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, values: Tensor, size: Size) -> Tensor:
        ctx.size = size
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, index, values)
        ctx.dtype = x.dtype
        return multiply(x, index, values, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        x, index, values = ctx.saved_tensors
        of_x = (
            multiply_transposed(of_output, index, values, ctx.size).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        )
        return of_x, None, None if x is None else at_entries(x, of_output, index), None
