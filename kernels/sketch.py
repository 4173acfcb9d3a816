"""Sketches of matrices: each group of a row has 16 centroids of its own, and each entry the 4-bit code of one.

SketchTune (Zhang et al., ICML 2025, arXiv 2410.06364). A row of W (d_out, d_in) is cut into `groups` equal parts. An
error in column j costs as much as the mean square of input j, so centroids minimise sum_j importance_j (w_j - c)^2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from offsite.kernels.device import by_device
from offsite.kernels.quantise import pack_nibbles, product, unpack_nibbles

CENTROIDS = 16
_PIECES = 64  # the first clustering only cuts between these; with 64 the final error is within 1 % of the least
_ROWS = 64  # row groups clustered at a time: their tables then stay in a core's cache
_FLOOR = 1e-9  # importance of a column whose input is always zero, as a share of the mean


def sketch(weight: Tensor, importance: Tensor, *, groups: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the grid (d_out, groups, 16) fp32, ascending, and the packed codes (d_out, d_in / 2) uint8 of a matrix.

    `importance` (d_in,) is the mean square of each input. Raises ValueError if groups do not fill bytes, or if
    anything is not finite.
    """
    d_out, d_in = weight.shape
    if d_in % (2 * groups):
        raise ValueError(f"a row of {d_in} entries cannot be cut into {groups} equal groups of an even length")
    if not (weight.isfinite().all() and importance.isfinite().all()):
        raise ValueError(f"a matrix ({d_out}, {d_in}) or the inputs it was given are not finite, so it has no sketch")
    relative = importance.double() / importance.double().mean().clamp(min=torch.finfo(torch.float64).tiny) + _FLOOR
    values = weight.float().reshape(d_out * groups, -1)
    weights = relative.view(1, groups, -1).expand(d_out, -1, -1).reshape(values.shape)
    some = [slice(start, start + _ROWS) for start in range(0, len(values), _ROWS)]
    grid = torch.cat([cluster(values[rows], weights[rows], iterations=iterations) for rows in some])
    codes = pack_nibbles(assign(values, grid).view(d_out, d_in))
    return grid.view(d_out, groups, CENTROIDS), codes


def assign(values: Tensor, grid: Tensor) -> Tensor:
    """Return the code (rows, n) uint8 of the centroid nearest to each value (rows, n), given ascending grids."""
    return torch.searchsorted(_midpoints(grid), values, right=True, out_int32=True).to(torch.uint8)


def cluster(values: Tensor, weights: Tensor, *, iterations: int) -> Tensor:
    """Return the ascending centroids (rows, 16) of weighted 1-D clusterings of values (rows, n).

    In one dimension a cluster is an interval of the sorted values, whose cost prefix sums give at once. A dynamic
    program finds the best cuts of a coarse set (all, and thus the optimum, if n <= 64), and Lloyd's steps refine them:
    alone they stay 10-50 % above the optimum where few columns carry most of the weight.
    """
    ordered, order = values.sort(dim=-1, stable=True)
    weights = weights.gather(-1, order)
    mass = functional.pad(weights.cumsum(-1), (1, 0))
    moment = functional.pad((weights * ordered).cumsum(-1), (1, 0))
    cuts = _partition(mass, moment, _candidates(ordered, weights))
    grid = _means(ordered, mass, moment, cuts)
    for _ in range(iterations):
        inner = torch.searchsorted(ordered, _midpoints(grid))
        cuts = torch.cat([cuts[:, :1], inner, cuts[:, -1:]], dim=1)
        grid = _means(ordered, mass, moment, cuts)
    return grid


def _midpoints(grid: Tensor) -> Tensor:
    return (grid[..., 1:] + grid[..., :-1]) / 2


def _means(ordered: Tensor, mass: Tensor, moment: Tensor, cuts: Tensor) -> Tensor:
    """Return the weighted mean between neighbouring cuts; of nothing, the value there, which keeps the order."""
    total = mass.gather(-1, cuts).diff(dim=-1)
    mean = moment.gather(-1, cuts).diff(dim=-1) / total
    here = ordered.gather(-1, cuts[:, :-1].clamp(max=ordered.shape[1] - 1))
    return torch.where(total > 0, mean.to(ordered.dtype), here).cummax(dim=-1).values  # against rounding


def _candidates(ordered: Tensor, weights: Tensor) -> Tensor:
    """Return where sorted values (rows, n) may be cut: (rows, pieces + 1) positions from 0 to n.

    A piece of width d and density p costs about p d^3 / 12, so equal steps of the integral of p^(1/3) make pieces of
    equal cost (Panter and Dite, 1951). The density at a value is its weight over its distance to its neighbours.
    """
    rows, n = ordered.shape
    if n <= _PIECES:
        return torch.arange(n + 1, device=ordered.device).expand(rows, -1)
    gaps = functional.pad(ordered.diff(dim=-1), (1, 1))
    steps = (weights * (gaps[:, 1:] + gaps[:, :-1]).double().square()).pow(1 / 3)
    integral = functional.pad(steps.cumsum(-1), (1, 0))
    shares = torch.linspace(0, 1, _PIECES + 1, dtype=integral.dtype, device=integral.device)
    positions = torch.searchsorted(integral, integral[:, -1:] * shares)
    positions[:, 0], positions[:, -1] = 0, n
    return positions


def _partition(mass: Tensor, moment: Tensor, candidates: Tensor) -> Tensor:
    """Return the 17 cuts (rows, 17) among the candidates (rows, m) that leave the least variance between them.

    The cost between two cuts is sum w v^2 - (sum w v)^2 / sum w, and the first term is the same for all choices: what
    is maximised is the sum of the second, by Fisher's dynamic program (1958).
    """
    total, sums = mass.gather(-1, candidates), moment.gather(-1, candidates)
    sums = sums - total * (sums[:, -1:] / total[:, -1:])  # centred, so that an offset costs no precision
    apart = total[:, None, :] - total[:, :, None]
    gain = (sums[:, None, :] - sums[:, :, None]).square_().div_(apart).float()  # [row, start, stop]
    gain.masked_fill_(apart == 0, 0.0).masked_fill_(apart < 0, -torch.inf)
    best, buffer = gain[:, 0], torch.empty_like(gain)
    before: list[Tensor] = []
    for _ in range(CENTROIDS - 1):
        before.append(best)
        best = torch.add(best[:, :, None], gain, out=buffer).amax(dim=1)
    stop = torch.full_like(candidates[:, :1], candidates.shape[1] - 1)
    cuts = [stop]
    for best in reversed(before):
        last = gain.gather(2, stop[:, :, None].expand(-1, gain.shape[1], -1)).squeeze(2)
        stop = (best + last).argmax(dim=1, keepdim=True)
        cuts.insert(0, stop)
    return candidates.gather(1, torch.cat([torch.zeros_like(stop), *cuts], dim=1))


class _Decode(torch.autograd.Function):
    """A gather that keeps half a byte for each entry for its backward pass, where autograd would keep eight."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shape = grid.shape
        return grid.flatten().index_select(0, _entries(codes, grid.shape)).view(len(grid), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        # index_add, unlike scatter_add, is deterministic on a GPU too where that is asked for.
        flat = gradient.new_zeros(ctx.shape.numel())
        return flat.index_add_(0, _entries(codes, ctx.shape), gradient.flatten()).view(ctx.shape), None


def _entries(codes: Tensor, shape: torch.Size) -> Tensor:
    """Return the position (d_out * d_in,) int32 of each entry's centroid in the flattened grid."""
    unpacked = unpack_nibbles(codes, 2 * codes.shape[1]).view(shape[0] * shape[1], -1)
    starts = torch.arange(0, shape.numel(), CENTROIDS, dtype=torch.int32, device=codes.device)
    return (starts[:, None] + unpacked).flatten()


def decode(grid: Tensor, codes: Tensor) -> Tensor:
    """Return W (d_out, d_in) = grid[row, group, code] of a grid (d_out, groups, 16) and packed codes (d_out, d_in / 2).

    Differentiable in the grid: the gradient of a centroid is the sum of those of its entries. Whatever the codes' bits
    are, they name a centroid.
    """
    decoded: Tensor = _Decode.apply(grid, codes)  # type: ignore[no-untyped-call]
    return decoded


@by_device
def multiply(x: Tensor, bias: Tensor | None, grid: Tensor, codes: Tensor, *, transposed: bool = False) -> Tensor:
    """Return `quantise.product` of x and the matrix (d_out, d_in) that `decode` returns."""
    return product(x, bias, decode(grid, codes), transposed=transposed)
