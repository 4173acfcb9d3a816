"""Strategies: exact where they promise to be, and the same whoever was first."""

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Strategy
from offsite.coordinator.aggregation.base import Adapter, adapter, pairs
from offsite.coordinator.aggregation.factor_mean import FactorMean
from offsite.coordinator.aggregation.low_rank import LowRank
from offsite.protos.errors import InputError

OUT, IN = 24, 16
MODULES = ("0.self_attn.q_proj", "5.mlp.up_proj")


def update(rank: int, *, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    made = {
        m: (torch.randn(OUT, rank, generator=generator), torch.randn(rank, IN, generator=generator)) for m in MODULES
    }
    return adapter(made)


def dense(given: Adapter) -> dict[str, torch.Tensor]:
    return {module: b.double() @ a.double() for module, (b, a) in pairs(given).items()}


def mean(updates: list[Adapter], weights: list[float]) -> dict[str, torch.Tensor]:
    return {m: sum(w * dense(u)[m] for u, w in zip(updates, weights, strict=True)) for m in MODULES}  # type: ignore[misc]


def fold(strategy: Strategy, updates: list[Adapter], weights: list[float], ranks: list[int]) -> aggregation.Aggregate:
    running = strategy.begin({})
    for one, weight in zip(updates, weights, strict=True):
        running.add(one, weight=weight)
    return running.finish(ranks)


def error(found: Adapter, wanted: dict[str, torch.Tensor]) -> float:
    return max(float((dense(found)[m] - wanted[m]).norm() / wanted[m].norm()) for m in MODULES)


WEIGHTS = [0.5, 0.3, 0.2]


@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 8, 4], [12, 12, 12]])
def test_low_rank_gives_the_weighted_mean_of_the_products(ranks: list[int]) -> None:
    updates = [update(rank, seed=seed) for seed, rank in enumerate(ranks)]
    outcome = fold(LowRank(), updates, WEIGHTS, sorted(set(ranks)))
    assert error(outcome.exact, mean(updates, WEIGHTS)) < 1e-5


def test_factor_mean_fails_what_low_rank_passes() -> None:
    updates = [update(4, seed=seed) for seed in range(3)]
    outcome = fold(FactorMean(), updates, WEIGHTS, [4])
    assert error(outcome.exact, mean(updates, WEIGHTS)) > 0.1


def test_broadcast_and_residual_together_are_exact() -> None:
    updates = [update(rank, seed=rank) for rank in (2, 8, 4)]
    outcome = fold(LowRank(), updates, WEIGHTS, [2, 4, 8])
    whole = {m: dense(outcome.broadcast[8])[m] + dense(outcome.residual[8])[m] for m in MODULES}
    assert error(outcome.exact, whole) < 1e-5
    for rank, sent in outcome.broadcast.items():
        assert all(a.shape == (rank, IN) for _, a in pairs(sent).values())


def test_one_site_is_passed_through_bit_for_bit() -> None:
    only = update(4, seed=1)
    outcome = fold(LowRank(), [only], [1.0], [4])
    assert all(torch.equal(outcome.exact[key], only[key]) for key in only)
    assert all(torch.equal(outcome.broadcast[4][key], only[key]) for key in only)


def test_the_residual_of_a_round_is_in_the_next() -> None:
    first = [update(4, seed=seed) for seed in range(3)]
    outcome = fold(LowRank(), first, WEIGHTS, [4])
    running = LowRank().begin(outcome.residual)
    running.add(outcome.broadcast[4], weight=1.0)  # a site that changed nothing
    again = running.finish([4])
    assert error(again.exact, mean(first, WEIGHTS)) < 1e-5


def test_a_round_in_which_nobody_trains_changes_nothing_whatever_the_ranks() -> None:
    first = fold(LowRank(), [update(2, seed=1), update(4, seed=2)], [0.5, 0.5], [2, 4])
    running = LowRank().begin(first.residual)
    for rank in (2, 4):
        running.add(first.broadcast[rank], weight=0.5)
    assert error(running.finish([2, 4]).exact, dense(first.exact)) < 1e-5


def test_memory_is_bounded_by_the_model_not_by_the_number_of_sites() -> None:
    running = LowRank().begin({})
    updates = [update(8, seed=seed) for seed in range(12)]
    for one in updates:
        running.add(one, weight=1 / 12)
    outcome = running.finish([8])
    assert all(b.shape[1] <= min(OUT, IN) for b, _ in pairs(outcome.exact).values())
    assert error(outcome.exact, mean(updates, [1 / 12] * 12)) < 1e-5


def test_the_told_factor_error_is_the_true_one() -> None:
    updates = [update(4, seed=seed) for seed in range(3)]
    wanted = mean(updates, WEIGHTS)
    biased = dense(fold(FactorMean(), updates, WEIGHTS, [4]).exact)
    off = sum(float((biased[m] - wanted[m]).norm() ** 2) for m in MODULES)
    true = (off / sum(float(wanted[m].norm() ** 2) for m in MODULES)) ** 0.5
    told = fold(LowRank(), updates, WEIGHTS, [4]).figures["factor_mean_error"]
    assert told == pytest.approx(true, rel=1e-4)


def test_unknown_names_and_settings_are_refused_with_what_is_known() -> None:
    with pytest.raises(InputError, match="factor-mean, low-rank"):
        aggregation.make("fedavg", {})
    with pytest.raises(InputError, match="strategy 'low-rank' has no setting 'momentum'; its settings are tolerance"):
        aggregation.make("low-rank", {"momentum": 1})
