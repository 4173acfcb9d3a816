"""Sparse matrices: what is smallest, and a product whose gradients are those of the matrix it never keeps."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offsite.kernels.sparse import Total, Vector, dense, distance, gradient, largest, product, smallest

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


def vector(count: int, *, seed: int, most: int = 60) -> Vector:
    draw = torch.Generator().manual_seed(seed)
    at = torch.randperm(most, generator=draw)[:count].sort().values.int()
    return Vector(at, torch.randn(count, generator=draw) * 10 ** torch.randint(-6, 7, (count,), generator=draw))


def test_a_sum_is_that_of_the_matrices_over_the_union_of_their_entries() -> None:
    vectors, weights = [vector(count, seed=count) for count in (10, 1, 25, 60)], [0.5, 0.3, 0.2, -2.0]
    total, expected = Total(), torch.zeros(6, 10, dtype=torch.float64)
    for number, (one, weight) in enumerate(zip(vectors, weights, strict=True), start=1):
        total.add(one, weight)
        expected += weight * dense(one.at, one.values.double(), (6, 10))
        made, union = total.vector(), torch.cat([one.at for one in vectors[:number]]).unique()
        assert torch.equal(made.at, union) and made.at.dtype == torch.int32 and made.values.dtype == torch.float32
        torch.testing.assert_close(dense(made.at, total.sum(), (6, 10)), expected, rtol=1e-14, atol=0)


def test_what_a_sum_rounds_to_does_not_depend_on_the_order_though_plain_sums_do() -> None:
    vectors = [vector(30, seed=seed) for seed in range(5)]
    vectors += [Vector(one.at, -one.values) for one in vectors[:2]]  # so that much cancels
    weights, made, plain = [0.11, 0.23, 0.29, 0.07, 0.3, 0.11, 0.23 + 1e-9], set(), set()
    for order in list(permutations(range(7)))[::97]:
        total, sums = Total(), torch.zeros(6, 10, dtype=torch.float64)
        for number in order:
            total.add(vectors[number], weights[number])
            sums += weights[number] * dense(vectors[number].at, vectors[number].values.double(), (6, 10))
        made.add((*total.vector().at.tolist(), *total.vector().values.tolist()))
        plain.add((*sums.flatten().tolist(),))
    assert len(made) == 1 and len(plain) > 1


def test_an_index_that_does_not_rise_is_refused() -> None:
    for at in ([3, 3], [4, 3]):
        with pytest.raises(ValueError, match="an entry twice, or not in order"):
            Total().add(Vector(torch.tensor(at), torch.ones(2)))


def test_two_matrices_are_as_far_apart_as_they_are_written_out() -> None:
    one, other = vector(10, seed=1), vector(30, seed=2)
    apart = float((dense(one.at, one.values, (6, 10)).double() - dense(other.at, other.values, (6, 10))).norm())
    assert distance(one, other) == pytest.approx(apart, rel=1e-12) and distance(one, one) == 0.0


def test_the_largest_are_those_of_the_largest_magnitude_and_of_equal_ones_the_first() -> None:
    assert largest(torch.tensor([1.0, -3.0, 2.0, 3.0, -2.0]), 3).tolist() == [1, 2, 3]
