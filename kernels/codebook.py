"""Additive codebooks: a group of g numbers is stored as M codes, and is the sum of the vectors that they name.

AQLM (Egiazarian et al., ICML 2024, arXiv 2401.06118). Groups are (n, g), books (M, K, g) and codes (n, M) uint8 with
K = 2^bits <= 256 vectors a book, so that a number costs M bits / g bits. A group's error is sum_j w_j (v_j - c_j)^2;
the weights w (n, g) are one where none are given.
"""

import torch
from torch import Tensor
from torch.nn import functional

from offsite.kernels.device import by_device
from offsite.kernels.quantise import product, unpack_nibbles

_ROWS = 4096  # groups encoded at a time: their distances to K vectors for every beam stay in a cache
_SAMPLE = 128  # groups a vector is fitted to; more move it little
_LLOYD = 10  # steps of k-means, after which the books are refined together


def decode(codes: Tensor, books: Tensor) -> Tensor:
    """Return the groups (n, g) that codes (n, M) stand for; differentiable in the books."""
    vectors = [functional.embedding(codes[:, at].int(), book) for at, book in enumerate(books)]
    return torch.stack(vectors).sum(dim=0)


def unpack(packed: Tensor, codebooks: int, *, bits: int, groups: int) -> Tensor:
    """Return the codes (groups, codebooks) uint8 that are stored as bytes: one each, or two of 4 bits."""
    codes = unpack_nibbles(packed, groups * codebooks) if bits == 4 else packed
    return codes.view(groups, codebooks)


def matrix(packed: Tensor, books: Tensor, scales: Tensor, *, d_in: int, bits: int) -> Tensor:
    """Return the matrix (d_out, d_in) fp32 whose rows are groups times a scale (d_out,) each."""
    codes = unpack(packed, len(books), bits=bits, groups=len(scales) * d_in // books.shape[-1])
    return decode(codes, books.float()).view(len(scales), d_in) * scales.float()[:, None]


@by_device
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
    """Return `quantise.product` of x and the `matrix` of these parts."""
    return product(x, bias, matrix(packed, books, scales, d_in=d_in, bits=bits), transposed=transposed)


def errors(groups: Tensor, codes: Tensor, books: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the error (n,) of each group as encoded."""
    apart = (groups - decode(codes, books)).square()
    return (apart if weights is None else apart * weights).sum(dim=-1)


def encode(
    groups: Tensor,
    books: Tensor,
    *,
    weights: Tensor | None = None,
    beam: int = 8,
    held: Tensor | None = None,
) -> Tensor:
    """Return the codes (n, M) uint8 of groups by beam search, book by book; where `held` codes err less they stay.

    Exact for one book, and for any number if the beam holds all sums.
    """
    parts = [
        _search(groups[rows], books, None if weights is None else weights[rows], beam)
        for rows in (slice(start, start + _ROWS) for start in range(0, len(groups), _ROWS))
    ]
    codes = torch.cat(parts) if parts else torch.empty(0, len(books), dtype=torch.uint8, device=groups.device)
    if held is None:
        return codes
    better = errors(groups, codes, books, weights) < errors(groups, held, books, weights)
    return torch.where(better[:, None], codes, held)


def fit(
    groups: Tensor,
    *,
    codebooks: int,
    bits: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    rounds: int = 6,
    beam: int = 8,
) -> Tensor:
    """Return books (M, K, g) for groups: k-means of what the books before left over, then all refined in turns.

    Draws from `generator` (on the CPU) only; no refinement raises the error on the groups it was fitted to.
    """
    count = 2**bits
    if len(groups) > _SAMPLE * count:
        some = torch.randperm(len(groups), generator=generator)[: _SAMPLE * count].to(groups.device)
        groups, weights = groups[some], None if weights is None else weights[some]
    weights = torch.ones_like(groups) if weights is None else weights
    rest, books = groups, groups.new_empty(0, count, groups.shape[1])
    for _ in range(codebooks):
        book = _kmeans(rest, weights, count, generator)
        rest = rest - book[_search(rest, book[None], weights, 1)[:, 0].int()]
        books = torch.cat([books, book[None]])
    codes = encode(groups, books, weights=weights, beam=beam)
    for _ in range(rounds):
        for at in range(codebooks):
            rest = groups - decode(codes, books) + books[at, codes[:, at].int()]
            books[at] = _means(rest, weights, codes[:, at], books[at])
        codes = encode(groups, books, weights=weights, beam=beam, held=codes)
    return books


def _search(groups: Tensor, books: Tensor, weights: Tensor | None, beam: int) -> Tensor:
    """Return codes (n, M): after each book the `beam` partial sums that leave the least error live on."""
    rest = groups[:, None]  # (n, beams, g) left over
    weights = torch.ones_like(rest) if weights is None else weights[:, None]
    codes = torch.empty(len(groups), 1, 0, dtype=torch.int64, device=groups.device)
    for at, book in enumerate(books):
        weighted = weights * rest
        error = (weighted * rest).sum(-1, keepdim=True) - 2 * weighted @ book.T + weights @ book.square().T
        size = 1 if at == len(books) - 1 else min(beam, error[0].numel())
        flat = error.flatten(1)
        best = flat.argmin(1, keepdim=True) if size == 1 else flat.topk(size, largest=False).indices
        source, code = best // len(book), best % len(book)
        rest = rest.gather(1, source[..., None].expand(-1, -1, rest.shape[-1])) - book[code]
        codes = torch.cat([codes.gather(1, source[..., None].expand(-1, -1, at)), code[..., None]], dim=-1)
    return codes[:, 0].to(torch.uint8)


def _kmeans(groups: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return a book (count, g) by Lloyd's steps from seeds drawn by distance (k-means++)."""
    book = groups[:1].repeat(count, 1)
    nearest = torch.full_like(groups[:, 0], torch.inf)
    for at in range(count):
        chances = nearest.cpu() if at else torch.ones(len(groups))
        if not chances.any():
            break  # every group is a seed
        book[at:] = groups[int(torch.multinomial(chances, 1, generator=generator))]
        nearest = torch.minimum(nearest, (weights * (groups - book[at]).square()).sum(-1))
    for _ in range(_LLOYD):
        book = _means(groups, weights, _search(groups, book[None], weights, 1)[:, 0], book)
    return book


def _means(groups: Tensor, weights: Tensor, codes: Tensor, book: Tensor) -> Tensor:
    """Return the weighted mean of the groups of each code; a vector that has none stays."""
    total = torch.zeros_like(book).index_add_(0, codes.int(), weights)
    sums = torch.zeros_like(book).index_add_(0, codes.int(), weights * groups)
    return torch.where(total > 0, sums / total, book)
