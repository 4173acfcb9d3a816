"""Products with matrices in additive codebooks."""

import triton
import triton.language as tl
from torch import Tensor

from offsite.kernels.gpu import packed as tiled
from offsite.kernels.gpu.packed import nibble


def multiply(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    books: Tensor,
    scales: Tensor,
    *,
    d_in: int,
    bits: int,
    transposed: bool = False,
) -> Tensor:
    """See `offsite.kernels.codebook.multiply`."""
    parts, numbers = (packed, books, scales), (books.shape[2], len(books), bits)
    return tiled.product(_decode, x, bias, parts, numbers, d_out=len(scales), d_in=d_in, transposed=transposed)


@triton.jit
def _decode(codes, books, scales, n, k, inside, d_in, GROUP: tl.constexpr, BOOKS: tl.constexpr, BITS: tl.constexpr):
    """Return entries of W: the sum of the vectors that a group's codes name, times the scale of its row."""
    first = (n * (d_in // GROUP) + k // GROUP) * BOOKS
    scale = tl.load(scales + n + k * 0, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros_like(scale)
    for book in tl.static_range(BOOKS):
        if BITS == 4:
            code = nibble(codes, first + book, inside)
        else:
            code = tl.load(codes + first + book, mask=inside, other=0).to(tl.int32)
        vector = ((book << BITS) + code) * GROUP
        total += tl.load(books + vector + k % GROUP, mask=inside, other=0.0).to(tl.float32)
    return total * scale
