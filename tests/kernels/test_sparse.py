"""Sparse matrices: what is smallest, and a product whose gradients are those of the matrix it never keeps."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offsite.kernels.sparse import dense, gradient, product, smallest

SIZE = (5, 7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INDEX = torch.tensor([0, 6, 7, 13, 34], dtype=torch.int32)


def test_the_smallest_are_those_of_a_stable_sort() -> None:
    values = drawn(200).mul(3).round()  # many are equal
    for count in (0, 1, 37, 199, 200):
        assert torch.equal(smallest(values, count), values.argsort(stable=True)[:count].sort().values)
    with pytest.raises(ValueError, match="201 smallest of 200"):
        smallest(values, 201)


def test_a_matrix_has_its_values_at_row_times_width_plus_column_and_zeros_elsewhere() -> None:
    values = drawn(5)
    matrix = dense(INDEX, values, SIZE)
    assert [(int(row), int(column)) for row, column in matrix.nonzero()] == [(0, 0), (0, 6), (1, 0), (1, 6), (4, 6)]
    assert torch.equal(matrix.flatten()[INDEX.long()], values)


def test_a_product_and_its_gradients_are_those_of_the_matrix() -> None:
    x, values = drawn(2, 3, 7, seed=1).requires_grad_(), drawn(5, seed=2).requires_grad_()
    assert torch.equal(product(x, INDEX, values, SIZE), functional.linear(x, dense(INDEX, values, SIZE)))
    assert torch.autograd.gradcheck(lambda x, values: product(x, INDEX, values, SIZE), (x, values))
    matrix = dense(INDEX, values, SIZE).detach().requires_grad_()
    output = functional.linear(x, matrix)
    (expected,) = torch.autograd.grad(output.square().sum(), matrix)
    torch.testing.assert_close(gradient(x.detach(), 2 * output.detach()), expected)


def test_half_precision_goes_in_and_the_values_own_comes_out() -> None:
    x, values = drawn(3, 7).bfloat16().requires_grad_(), drawn(5).float().requires_grad_()
    output = product(x, INDEX, values, SIZE)
    output.sum().backward()
    assert output.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert values.grad is not None and values.grad.dtype == torch.float32


def test_nothing_as_large_as_the_matrix_is_kept_for_the_way_back() -> None:
    size, kept = (300, 400), list[int]()
    index, values = torch.arange(0, 300 * 400, 1000), torch.zeros(120, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product(torch.ones(2, 400), index, values, size)
    assert sorted(kept) == [120, 120, 800]
