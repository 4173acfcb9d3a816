from itertools import product

import pytest
import torch
from torch import Tensor

from offsite.kernels import codebook


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(groups: Tensor, *, codebooks: int = 2, bits: int = 4, seed: int = 0, **settings: object) -> Tensor:
    drawing = torch.Generator().manual_seed(seed)
    return codebook.fit(groups, codebooks=codebooks, bits=bits, generator=drawing, **settings)  # type: ignore[arg-type]


def test_a_group_is_the_sum_of_the_vectors_its_codes_name() -> None:
    books = drawn(3, 16, 5)
    codes = torch.tensor([[0, 15, 7], [3, 3, 3]], dtype=torch.uint8)
    expected = torch.stack([books[0, 0] + books[1, 15] + books[2, 7], books[0, 3] + books[1, 3] + books[2, 3]])
    assert torch.equal(codebook.decode(codes, books), expected)


@pytest.mark.parametrize(("count", "bits"), [(1, 8), (2, 4), (3, 2)])
def test_what_codebooks_span_is_encoded_exactly(count: int, bits: int) -> None:
    books = drawn(count, 2**bits, 6)
    codes = torch.randint(0, 2**bits, (5000, count), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    groups = codebook.decode(codes, books)
    assert torch.equal(codebook.encode(groups, books, beam=2 ** (bits * (count - 1))), codes)


def test_no_beam_beats_the_search_of_all_sums_and_a_full_one_equals_it() -> None:
    books, groups, weights = drawn(2, 8, 3), drawn(200, 3, seed=1), drawn(200, 3, seed=2).square()
    every = torch.tensor(list(product(range(8), repeat=2)), dtype=torch.uint8)
    best = torch.stack([codebook.errors(groups, pair.expand(200, 2), books, weights) for pair in every]).amin(dim=0)
    narrow, full = (
        codebook.errors(groups, codebook.encode(groups, books, weights=weights, beam=beam), books, weights)
        for beam in (1, 8)
    )
    torch.testing.assert_close(full, best, rtol=1e-5, atol=1e-6)
    assert (narrow >= best * (1 - 1e-5) - 1e-6).all() and narrow.sum() > 1.02 * best.sum()


def test_codes_held_stay_where_the_search_finds_none_better() -> None:
    books, groups = drawn(2, 16, 4), drawn(300, 4, seed=1)
    best, narrow = codebook.encode(groups, books, beam=16), codebook.encode(groups, books, beam=1)
    assert not torch.equal(best, narrow)
    assert torch.equal(codebook.encode(groups, books, beam=1, held=best), best)
    assert torch.equal(codebook.encode(groups, books, beam=16, held=narrow), best)


def test_as_many_vectors_as_there_are_distinct_groups_store_them_exactly() -> None:
    groups = drawn(16, 5).repeat(7, 1)
    books = fitted(groups, codebooks=1)
    torch.testing.assert_close(codebook.decode(codebook.encode(groups, books), books), groups, rtol=1e-5, atol=1e-6)
    few = fitted(groups[:3], codebooks=2)  # more vectors than groups
    torch.testing.assert_close(codebook.decode(codebook.encode(groups[:3], few), few), groups[:3])


def test_a_fit_depends_on_its_seed_alone_and_refining_it_helps() -> None:
    groups = drawn(3000, 4)
    books = fitted(groups)
    torch.randn(1)
    assert torch.equal(fitted(groups), books) and not torch.equal(fitted(groups, seed=1), books)
    errors = [
        float(codebook.errors(groups, codebook.encode(groups, books), books).mean())
        for books in (drawn(2, 16, 4, seed=3), fitted(groups, rounds=0), books)
    ]
    assert errors[2] < 0.97 * errors[1] and errors[1] < 0.8 * errors[0]
    assert errors[2] < 4 * 0.1175  # what the best 2-bit levels leave of 4 normal numbers one by one (Max, 1960)


def test_weights_move_the_error_to_where_it_counts_less() -> None:
    groups = drawn(2000, 4)
    weights = torch.tensor([100.0, 1.0, 1.0, 1.0]).expand_as(groups)
    plain, weighted = fitted(groups), fitted(groups, weights=weights)
    codes = [codebook.encode(groups, plain), codebook.encode(groups, weighted, weights=weights)]
    apart = [
        (groups - codebook.decode(code, books)).square().mean(dim=0)
        for code, books in zip(codes, (plain, weighted), strict=True)
    ]
    assert apart[1][0] < 0.2 * apart[0][0] and apart[1][1:].sum() > apart[0][1:].sum()


def test_decoding_is_differentiable_in_the_books() -> None:
    books = drawn(2, 4, 3).double().requires_grad_()
    codes = torch.tensor([[0, 1], [0, 3], [2, 3]], dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda books: codebook.decode(codes, books), (books,))
