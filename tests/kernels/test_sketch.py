"""Sketches, against an exhaustive optimum and against autograd through a plain gather."""

import pytest
import torch
from torch import Tensor

from offsite.kernels.quantise import unpack_nibbles
from offsite.kernels.sketch import CENTROIDS, assign, cluster, decode, sketch


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(count: int, *, seed: int = 1) -> Tensor:
    """Mean squares of inputs as they are in language models: a few columns carry most of it."""
    return drawn(count, seed=seed).mul(2.0).exp()


def errors(weight: Tensor, importance: Tensor, grid: Tensor, codes: Tensor) -> Tensor:
    return ((weight - decode(grid, codes)).double().square() * importance.double()).sum(dim=1)


def least_error(values: Tensor, weights: Tensor) -> float:
    """The optimum of the weighted 1-D clustering, by the dynamic program over all intervals."""
    ordered, order = values.double().sort()
    w = weights.double()[order]
    reached = [torch.nn.functional.pad((w * ordered**power).cumsum(0), (1, 0)) for power in range(3)]
    mass, first, second = (sums[None, :] - sums[:, None] for sums in reached)  # of each interval [start, stop)
    cost = torch.where(mass > 0, second - first.square() / mass, torch.where(mass == 0, 0.0, torch.inf))
    best = cost[0]
    for _ in range(CENTROIDS - 1):
        best = (best[:, None] + cost).amin(dim=0)
    return float(best[-1])


def test_a_short_group_gets_the_optimal_centroids() -> None:
    weight, importance = drawn(3, 40), skewed(40)
    found = errors(weight, importance, *sketch(weight, importance, groups=1, iterations=0))
    for row, error in zip(weight, found, strict=True):
        assert float(error) == pytest.approx(least_error(row, importance), rel=1e-4)


def test_a_long_group_gets_centroids_within_two_percent_of_the_optimum() -> None:
    weight, importance = drawn(3, 200), skewed(200)
    found = errors(weight, importance, *sketch(weight, importance, groups=1, iterations=4))
    for row, error in zip(weight, found, strict=True):
        assert 0.9999 <= float(error) / least_error(row, importance) <= 1.02


def test_every_step_of_lloyd_lowers_the_error() -> None:
    weight, importance = drawn(20, 300), skewed(300)
    found = [errors(weight, importance, *sketch(weight, importance, groups=1, iterations=n)) for n in (0, 1, 2, 4)]
    for before, after in zip(found, found[1:], strict=False):
        assert bool((after <= before * (1 + 1e-6)).all())
    assert float(found[-1].sum()) < float(found[0].sum())


def test_centroids_are_the_weighted_means_of_their_entries() -> None:
    weight, importance = drawn(4, 100), skewed(100)
    grid, codes = sketch(weight, importance, groups=1, iterations=20)  # long enough to converge
    chosen = torch.nn.functional.one_hot(unpack_nibbles(codes, 100).long(), CENTROIDS).double()
    mass = torch.einsum("rnk,n->rk", chosen, importance.double())
    mean = torch.einsum("rnk,n,rn->rk", chosen, importance.double(), weight.double()) / mass
    torch.testing.assert_close(grid[:, 0].double(), mean, rtol=1e-4, atol=1e-5)


def test_every_entry_has_the_code_of_its_nearest_centroid() -> None:
    values, grid = drawn(5, 90), drawn(5, CENTROIDS, seed=2).sort(dim=1).values
    nearest = (values[:, :, None] - grid[:, None, :]).abs().argmin(dim=-1)
    assert torch.equal(assign(values, grid).long(), nearest)


def test_looking_at_the_inputs_lowers_the_error_that_they_see() -> None:
    weight, importance = drawn(24, 256), skewed(256)
    aware = errors(weight, importance, *sketch(weight, importance, groups=1, iterations=4))
    plain = errors(weight, importance, *sketch(weight, torch.ones(256), groups=1, iterations=4))
    assert bool((aware < plain).all()) and float(aware.sum()) < 0.5 * float(plain.sum())


def test_more_groups_lower_the_error() -> None:
    weight, importance = drawn(8, 256), skewed(256)
    one, four = (errors(weight, importance, *sketch(weight, importance, groups=n, iterations=4)) for n in (1, 4))
    assert float(four.sum()) < 0.7 * float(one.sum())


def test_sixteen_values_are_stored_exactly() -> None:
    levels = torch.linspace(-1, 1, CENTROIDS)
    weight = levels[torch.randint(CENTROIDS, (6, 48), generator=torch.Generator().manual_seed(3))]
    for groups in (1, 3):
        torch.testing.assert_close(decode(*sketch(weight, skewed(48), groups=groups, iterations=4)), weight)
    zeros = torch.zeros(2, 100)
    assert torch.equal(decode(*sketch(zeros, torch.ones(100), groups=1, iterations=4)), zeros)


def test_the_scales_of_weights_and_inputs_do_not_matter() -> None:
    weight, importance = drawn(4, 128), skewed(128)
    grid, codes = sketch(weight, importance, groups=2, iterations=4)
    scaled, same = sketch(8 * weight, 1024 * importance, groups=2, iterations=4)
    assert torch.equal(same, codes)
    torch.testing.assert_close(scaled, 8 * grid)


def test_inputs_that_are_always_zero_count_alike() -> None:
    weight = drawn(4, 128)
    silent, level = (sketch(weight, torch.full((128,), value), groups=1, iterations=4) for value in (0.0, 1.0))
    assert torch.equal(silent[1], level[1])
    torch.testing.assert_close(silent[0], level[0])


def test_a_row_is_sketched_alike_whatever_rows_are_beside_it() -> None:
    weight, importance = drawn(150, 70), skewed(70)
    grid, codes = sketch(weight, importance, groups=1, iterations=4)
    alone = sketch(weight[97:131], importance, groups=1, iterations=4)
    assert torch.equal(alone[0], grid[97:131]) and torch.equal(alone[1], codes[97:131])


@pytest.mark.parametrize("groups", [1, 3])
def test_decoding_is_a_gather_and_its_gradient_a_scatter(groups: int) -> None:
    grid = drawn(7, groups, CENTROIDS).requires_grad_()
    codes = torch.randint(256, (7, 18), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    upstream = drawn(7, 36, seed=5)
    index = unpack_nibbles(codes, 36).long().view(7, groups, -1)
    plain = grid.gather(2, index).view(7, 36)
    (expected,) = torch.autograd.grad(plain, grid, upstream)
    decoded = decode(grid, codes)
    (found,) = torch.autograd.grad(decoded, grid, upstream)
    assert torch.equal(decoded, plain)
    scattered = torch.zeros(7, groups, CENTROIDS).scatter_add_(2, index, upstream.view(7, groups, -1))
    torch.testing.assert_close(found, scattered, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_backward_pass_keeps_half_a_byte_an_entry() -> None:
    grid, codes = sketch(drawn(6, 64), torch.ones(64), groups=1, iterations=0)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decode(grid.requires_grad_(), codes)
    assert sum(tensor.nbytes for tensor in kept) == 6 * 64 // 2


def test_the_mean_of_grids_is_the_mean_of_matrices() -> None:
    weight = drawn(9, 48)
    grid, codes = sketch(weight, torch.ones(48), groups=3, iterations=4)
    sites = [grid + 0.1 * drawn(*grid.shape, seed=seed) for seed in range(5)]
    mean = torch.stack([decode(one, codes) for one in sites]).mean(dim=0)
    torch.testing.assert_close(decode(torch.stack(sites).mean(dim=0), codes), mean, rtol=0, atol=1e-6)


def test_centroids_stay_in_order_where_values_repeat() -> None:
    values = drawn(12, 90).mul(2).round()  # a few values, many times each: some clusters are empty
    grid = cluster(values, skewed(90).double().expand(12, -1), iterations=4)
    assert bool((grid.diff(dim=1) >= 0).all())


def test_what_has_no_sketch_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 4 equal groups of an even length"):
        sketch(drawn(2, 20), torch.ones(20), groups=4, iterations=0)
    with pytest.raises(ValueError, match="not finite"):
        sketch(drawn(2, 20), torch.full((20,), torch.nan), groups=1, iterations=0)
