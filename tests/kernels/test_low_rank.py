"""Algebra of products held as factors, against the dense products."""

import pytest
import torch

from offsite.kernels.low_rank import BLOCK, Total, compress, decompose, distance, inner, split, stack


def pair(out: int, rank: int, inn: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, inn, generator=generator)


def dense(factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return factors[0].double() @ factors[1].double()


def test_stacking_is_the_exact_sum() -> None:
    a, b = pair(20, 3, 12, seed=0), pair(20, 5, 12, seed=1)
    torch.testing.assert_close(dense(stack([a, b])), dense(a) + dense(b))


def test_decomposition_is_the_dense_one() -> None:
    product = pair(20, 4, 12, seed=2)
    u, s, vh = decompose(product)
    torch.testing.assert_close((u * s) @ vh, dense(product))
    torch.testing.assert_close(s, torch.linalg.svdvals(dense(product))[:4])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_split_is_the_best_approximation_and_nothing_is_lost(rank: int) -> None:
    product = pair(20, 8, 12, seed=3)
    near, rest = split(product, rank)
    assert near[0].shape == (20, rank) and near[1].shape == (rank, 12)
    torch.testing.assert_close(dense(near) + dense(rest), dense(product), rtol=1e-4, atol=1e-4)
    tail = torch.linalg.svdvals(dense(product))[rank:]
    assert distance(product, near) == pytest.approx(float(tail.square().sum().sqrt()), rel=1e-4)


def test_a_split_is_balanced() -> None:
    (left, right), _ = split(pair(20, 8, 12, seed=4), 4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_a_split_wider_than_the_product_has_spare_columns_that_can_train() -> None:
    product = pair(20, 2, 12, seed=5)
    near, rest = split(product, 6)
    assert near[0].shape == (20, 6) and not near[0][:, 2:].any() and rest[0].shape == (20, 0)
    assert bool(near[1][2:].any(dim=1).all())
    torch.testing.assert_close(dense(near), dense(product), rtol=1e-4, atol=1e-4)


def test_a_product_of_zero_splits_into_a_fresh_start() -> None:
    near, rest = split((torch.zeros(5, 2), torch.zeros(2, 4)), 2)
    assert not near[0].any() and near[1].any() and rest[0].shape[1] == 0


def test_compression_keeps_the_product_at_its_true_rank() -> None:
    product = stack([pair(9, 6, 7, seed=6), pair(9, 6, 7, seed=7)])
    smaller = compress(product)
    assert smaller[0].shape == (9, 7)
    torch.testing.assert_close(dense(smaller), dense(product), rtol=1e-4, atol=1e-4)


def test_inner_products_need_no_dense_product() -> None:
    a, b = pair(20, 3, 12, seed=8), pair(20, 5, 12, seed=9)
    assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-9)


def total(*products: tuple[torch.Tensor, torch.Tensor]) -> Total:
    running = Total()
    for product in products:
        running.add(product)
    return running


def test_a_total_is_the_stack_while_that_is_narrower_than_the_matrix() -> None:
    products = [pair(20, 3, 12, seed=seed) for seed in range(4)]
    left, right = total(*products).pair()
    assert torch.equal(left, stack(products)[0]) and torch.equal(right, stack(products)[1])
    assert total(products[0]).pair() == products[0], "one product is itself"


@pytest.mark.parametrize("count", [5, 2 * BLOCK // 3 + 1])
def test_a_total_of_many_products_is_their_sum_at_the_rank_of_the_matrix(count: int) -> None:
    products = [pair(20, 3, 12, seed=seed) for seed in range(count)]
    running, exact = total(*products), sum(dense(product) for product in products)
    assert isinstance(exact, torch.Tensor) and running.pair()[0].shape == (20, 12)
    torch.testing.assert_close(dense(running.pair()), exact, rtol=1e-5, atol=1e-5)
    assert running.square() == pytest.approx(float(exact.square().sum()), rel=1e-5)
    far = pair(20, 2, 12, seed=999)
    assert running.distance(far) == pytest.approx(float((exact - dense(far)).norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [4, 2 * BLOCK // 3 + 1])
def test_a_weighted_total_has_the_bits_of_one_of_weighted_products(count: int, dtype: torch.dtype) -> None:
    products = [tuple(factor.to(dtype) for factor in pair(20, 3, 12, seed=seed)) for seed in range(count)]
    weights = [(seed + 1) / (7 * count) for seed in range(count)]
    running = Total()
    for (left, right), weight in zip(products, weights, strict=True):
        running.add((left, right), weight)
    apart = total(*((weight * left, right) for (left, right), weight in zip(products, weights, strict=True)))
    assert all(torch.equal(mine, its) for mine, its in zip(running.pair(), apart.pair(), strict=True))


@pytest.mark.parametrize("count", [1, 4, 2 * BLOCK // 3 + 1])
def test_a_total_knows_the_sums_of_the_factors_of_equal_rank(count: int) -> None:
    products, weights = [pair(20, 3, 12, seed=seed) for seed in range(count)], [1 / (seed + 2) for seed in range(count)]
    running = Total()
    for product, weight in zip(products, weights, strict=True):
        running.add(product, weight)
    for mine, factors in zip(running.factors(), zip(*products, strict=True), strict=True):
        exact = sum(weight * factor.double() for weight, factor in zip(weights, factors, strict=True))
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    running.add(pair(20, 2, 12, seed=1))
    with pytest.raises(AssertionError, match="one rank"):
        running.factors()


@pytest.mark.parametrize("count", [3, 2 * BLOCK // 3 + 1])
def test_a_total_is_split_by_the_decomposition_that_it_has(count: int) -> None:
    running = total(*(pair(20, 3, 12, seed=seed) for seed in range(count)))
    apart, known = split(running.pair(), 4), split(running.pair(), 4, svd=running.svd())
    for mine, its in zip(known, apart, strict=True):
        torch.testing.assert_close(dense(mine), dense(its), rtol=1e-4, atol=1e-4)
    if count > 3:  # it is held as a matrix: then the two are the columns of the whole, bit for bit
        assert torch.equal(torch.cat([known[0][0], known[1][0]], 1), running.pair()[0])
    before = running.svd()[1]
    running.add(pair(20, 3, 12, seed=999))
    assert not torch.equal(running.svd()[1], before), "of what it has become"
