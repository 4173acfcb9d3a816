"""Triton's products with matrices of few entries, beside their references."""

import pytest
import torch
from torch import Tensor

from offsite.kernels import sparse
from offsite.kernels.device import twin

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytestmark = pytest.mark.slow(alone=True)  # as the interpreter is; CI runs them

CASES = {  # rows of x, (d_out, d_in), entries
    "a few": (3, (5, 7), 6),
    "many of one row": (70, (2, 20), 30),
    "more rows than entries": (2, (90, 3), 11),
    "no entries": (3, (5, 7), 0),
    "no rows": (0, (5, 7), 6),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def index_of(size: sparse.Size, count: int) -> Tensor:
    at = torch.randperm(size[0] * size[1], generator=torch.Generator().manual_seed(0))[:count]
    return at.sort().values.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_its_reference(transposed: bool, case: str, dtype: torch.dtype) -> None:
    rows, size, count = CASES[case]
    index, values = index_of(size, count), drawn(count, seed=1)
    x = drawn(size[0 if transposed else 1], rows, seed=2).to(dtype).T  # of strides of its own
    reference = sparse.multiply_transposed if transposed else sparse.multiply
    actual, expected = (run(x, index, values, size) for run in (twin(reference.__wrapped__), reference.__wrapped__))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_at_entries_is_its_reference(case: str, dtype: torch.dtype) -> None:
    rows, size, count = CASES[case]
    index, x, of_output = index_of(size, count), drawn(rows, size[1], seed=1).to(dtype), drawn(rows, size[0], seed=2)
    kernel = twin(sparse.at_entries.__wrapped__)
    torch.testing.assert_close(kernel(x, of_output, index), sparse.at_entries.__wrapped__(x, of_output, index))


def test_leading_dimensions_stay() -> None:
    index, values, x = index_of((5, 7), 6), drawn(6, seed=1), drawn(2, 3, 7, seed=2)
    kernel = twin(sparse.multiply.__wrapped__)
    torch.testing.assert_close(kernel(x, index, values, (5, 7)), sparse.multiply.__wrapped__(x, index, values, (5, 7)))
