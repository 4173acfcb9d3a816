"""Averages of adapters: products as their matrices, other values by themselves."""

import pytest
import torch
from torch import Tensor

from offsite.coordinator.memory.averages import average, moving
from offsite.kernels.schema import Field, Rule, Schema, Tensors

SCHEMA: Schema = {
    "q.A": Field("F32", (None, 12), Rule.PRODUCT, "q"),
    "q.B": Field("F32", (10, None), Rule.PRODUCT, "q"),
    "norm": Field("F32", (7,), Rule.MEAN),
    "up": Field("F32", (3,), Rule.MEAN, "expert"),
    "down": Field("F32", (3,), Rule.MEAN, "expert"),
    "index": Field("I64", (2,), Rule.FIXED, below=5),
}
SHARES = {"q": 0.25, "norm": 0.5, "expert": 0.75}


def adapter(seed: int, rank: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"q.A": (rank, 12), "q.B": (10, rank), "norm": (7,), "up": (3,), "down": (3,)}
    moving_ = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    return moving_ | {"index": torch.tensor([seed % 5, 4])}


def matrix(one: Tensors) -> Tensor:
    return one["q.B"].double() @ one["q.A"].double()


def test_each_group_is_averaged_with_its_own_share() -> None:
    old, new = adapter(0, 2), adapter(1, 3)
    made = average(old, new, SHARES, SCHEMA)
    assert made.keys() == SCHEMA.keys()
    torch.testing.assert_close(matrix(made), 0.75 * matrix(old) + 0.25 * matrix(new), rtol=1e-6, atol=1e-6)
    for key, share in (("norm", 0.5), ("up", 0.75), ("down", 0.75)):
        torch.testing.assert_close(made[key], (1 - share) * old[key] + share * new[key])
    assert torch.equal(made["index"], new["index"]) and moving(SCHEMA) == ["expert", "norm", "q"]


def test_shares_of_nought_and_one_give_one_of_the_two_bit_for_bit() -> None:
    old, new = adapter(0, 2), adapter(0, 3)
    for share, expected in ((0.0, old), (1.0, new)):
        made = average(old, new, dict.fromkeys(SHARES, share), SCHEMA)
        assert all(torch.equal(tensor, made[key]) for key, tensor in expected.items())


def test_ranks_never_exceed_those_of_the_matrix() -> None:
    total = adapter(0, 4)
    expected = matrix(total)
    for seed in range(1, 6):
        new = adapter(seed, 4)
        total, expected = average(total, new, SHARES, SCHEMA), 0.75 * expected + 0.25 * matrix(new)
        assert total["q.A"].shape[0] <= 10
    torch.testing.assert_close(matrix(total), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_rank_gives_the_best_approximation_that_has_no_more(rank: int) -> None:
    old, new = adapter(0, 2), adapter(1, 3)
    made, whole = matrix(average(old, new, SHARES, SCHEMA, rank=rank)), matrix(average(old, new, SHARES, SCHEMA))
    values = torch.linalg.svdvals(whole)
    assert torch.linalg.matrix_rank(made, tol=1e-5) == rank
    torch.testing.assert_close((made - whole).norm(), values[rank:].norm(), rtol=1e-5, atol=1e-6)
    assert torch.equal(matrix(average(old, new, SHARES, SCHEMA, rank=5)), whole), "it has no more than that"


def test_the_mean_of_factors_is_another() -> None:
    old, new = adapter(0, 3), adapter(1, 3)
    factors = {key: 0.75 * old[key] + 0.25 * new[key] for key in ("q.A", "q.B")}
    made = average(old, new, SHARES, SCHEMA)
    assert (matrix(factors) - matrix(made)).norm() > 0.1 * matrix(made).norm()
