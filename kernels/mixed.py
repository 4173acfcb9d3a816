"""LoRA of several adapters in one batch: each row goes through the adapter that it names, at that adapter's rank.

    y[i] + B_a A_a x[i],  a = which[i];  a row that names -1 stays as it is

Shapes: the A (r_a, d_in) of all adapters lie one below the other, (R, d_in), and so do the transposed B, (R, d_out);
adapter a has the rows starts[a] to starts[a + 1] of both. Grouped so by Punica (arXiv 2310.18547) and S-LoRA (arXiv
2311.03285), which do not train. What a row gets does not depend on the rows of other adapters.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from offsite.kernels.device import by_device

Starts = tuple[int, ...]  # (adapters + 1,), from 0 to R


class Adapters(NamedTuple):
    """What several adapters have for one map."""

    down: Tensor  # (R, d_in)
    up: Tensor  # (R, d_out)
    starts: Starts


def stack(pairs: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float]) -> Adapters:
    """Put adapters' factors A (r, d_in) and B (d_out, r) together, with B times its scale."""
    starts = [0]
    for down, _ in pairs:
        starts.append(starts[-1] + len(down))
    ups = [(up * scale).T for (_, up), scale in zip(pairs, scales, strict=True)]
    return Adapters(torch.cat([down for down, _ in pairs]), torch.cat(ups), tuple(starts))


def add(y: Tensor, x: Tensor, which: Tensor, adapters: Adapters) -> Tensor:
    """Return y (..., d_out) with what each row of x (..., d_in) gets of its adapter; differentiable but in `which`.

    `which` has integers from -1 to the number of adapters less one, for each row, or for each of the first dimensions
    (one for a sequence): its shape begins x's. Raises ValueError if it does not. Factors are multiplied in their dtype.
    """
    if which.ndim >= x.ndim or which.shape != x.shape[: which.ndim]:
        raise ValueError(f"which {tuple(which.shape)} names no adapter for each row of x {tuple(x.shape)}")
    rows = which.reshape(*which.shape, *(1 for _ in x.shape[which.ndim : -1])).expand(x.shape[:-1]).flatten()
    result: Tensor = _Mixed.apply(y, x, rows, *adapters)  # type: ignore[no-untyped-call]
    return result


@by_device
def shrink(x: Tensor, factors: Tensor, which: Tensor, starts: Starts) -> Tensor:
    """Return the products (m, most rows of an adapter) of x (m, d) with its adapter's rows of factors (R, d).

    They are in the factors' dtype, and zero where an adapter has fewer rows than another.
    """
    result = factors.new_zeros(len(x), _most(starts))
    for rows, part in _parts(which, starts):
        product = functional.linear(x[rows].to(factors.dtype), factors[part])
        result[rows, : product.shape[1]] = product
    return result


@by_device
def expand(x: Tensor, factors: Tensor, which: Tensor, starts: Starts) -> Tensor:
    """Return the sums (m, d) of an adapter's rows of factors (R, d), each times a number of x, as `shrink` has them."""
    result = factors.new_zeros(len(x), factors.shape[1])
    for rows, part in _parts(which, starts):
        result[rows] = x[rows, : part.stop - part.start].to(factors.dtype) @ factors[part]
    return result


@by_device
def outer(x: Tensor, y: Tensor, which: Tensor, starts: Starts) -> Tensor:
    """Return the gradient (R, d) of factors, in x's dtype: by adapter, the sum of x[i]' y[i] over its rows i."""
    result = x.new_zeros(starts[-1], y.shape[1])
    for rows, part in _parts(which, starts):
        result[part] = x[rows, : part.stop - part.start].T @ y[rows].to(x.dtype)
    return result


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, which: Tensor, down: Tensor, up: Tensor, starts: Starts) -> Tensor:
        narrow = shrink(_flat(x), down, which, starts)
        trains = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x if trains else None, narrow if trains else None, which, down, up)
        ctx.starts, ctx.like = starts, (x.shape, x.dtype)
        return y + expand(narrow, up, which, starts).view(y.shape).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        (x, narrow, which, down, up), (size, dtype) = ctx.saved_tensors, ctx.like
        rows = _flat(of_output)
        of_narrow = shrink(rows, up, which, ctx.starts)
        of_x = expand(of_narrow, down, which, ctx.starts).view(size).to(dtype) if ctx.needs_input_grad[1] else None
        of_down = outer(of_narrow, _flat(x), which, ctx.starts) if ctx.needs_input_grad[3] else None
        of_up = outer(narrow, rows, which, ctx.starts) if ctx.needs_input_grad[4] else None
        return of_output, of_x, None, of_down, of_up, None


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


@lru_cache(maxsize=16)
def _most(starts: Starts) -> int:
    """Return the largest rank."""
    return max((stop - start for start, stop in pairwise(starts)), default=0)


def _parts(which: Tensor, starts: Starts) -> Iterator[tuple[Tensor, slice]]:
    """Yield which rows name an adapter, and what it has of the factors, by adapter that is named."""
    names, order = which.sort(stable=True)
    named, counts = torch.unique_consecutive(names, return_counts=True)
    for at, rows in zip(named.tolist(), torch.split(order, counts.tolist()), strict=True):
        if at >= 0:
            yield rows, slice(starts[at], starts[at + 1])
