"""Products with sketched matrices."""

import triton
import triton.language as tl
from torch import Tensor

from offsite.kernels.gpu import packed
from offsite.kernels.gpu.packed import nibble


def multiply(x: Tensor, bias: Tensor | None, grid: Tensor, codes: Tensor, *, transposed: bool = False) -> Tensor:
    """See `offsite.kernels.sketch.multiply`."""
    (d_out, groups, centroids), d_in = grid.shape, 2 * codes.shape[1]
    parts, numbers = (codes, grid, grid), (d_in // groups, groups, centroids)
    return packed.product(_decode, x, bias, parts, numbers, d_out=d_out, d_in=d_in, transposed=transposed)


@triton.jit
def _decode(codes, grid, _, n, k, inside, d_in, WIDTH: tl.constexpr, GROUPS: tl.constexpr, CENTROIDS: tl.constexpr):
    """Return entries of W: the centroid, of their row group, that a code names."""
    code = nibble(codes, n * d_in + k, inside)
    return tl.load(grid + (n * GROUPS + k // WIDTH) * CENTROIDS + code, mask=inside, other=0.0).to(tl.float32)
