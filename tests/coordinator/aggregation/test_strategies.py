"""Strategies: exact where they promise to be, and the same whoever was first."""

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Strategy, Version
from offsite.coordinator.aggregation.factor_mean import FactorMean
from offsite.coordinator.aggregation.low_rank import LowRank
from offsite.kernels.low_rank import split, stack
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos.errors import InputError

OUT, IN = 24, 16
MODULES = ("0.self_attn.q_proj", "5.mlp.up_proj")
SCHEMA: Schema = {
    f"{module}.{factor}": Field("F32", (OUT, None) if factor == "B" else (None, IN), Rule.PRODUCT, module)
    for module in MODULES
    for factor in "AB"
}


def update(rank: int, *, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for module in MODULES:
        made[f"{module}.B"] = torch.randn(OUT, rank, generator=generator)
        made[f"{module}.A"] = torch.randn(rank, IN, generator=generator)
    return made


def begun(*ranks: int) -> Version:
    """What a run begins from, with sites of these ranks."""
    starts = {f"r{rank}": update(rank, seed=rank) for rank in ranks}
    return Version(adapter=starts[f"r{max(ranks)}"], broadcast=starts)


def rank(given: Tensors) -> int:
    return given[f"{MODULES[0]}.A"].shape[0]


def origin(given: Tensors, weight: float) -> Origin:
    return Origin("ward", f"r{rank(given)}", weight)


def dense(given: Tensors) -> dict[str, torch.Tensor]:
    return {module: given[f"{module}.B"].double() @ given[f"{module}.A"].double() for module in MODULES}


def mean(updates: list[Tensors], weights: list[float]) -> dict[str, torch.Tensor]:
    return {m: sum(w * dense(u)[m] for u, w in zip(updates, weights, strict=True)) for m in MODULES}  # type: ignore[misc]


def fold(strategy: Strategy, updates: list[Tensors], weights: list[float], ranks: list[int]) -> Version:
    running = strategy.begin(begun(*ranks), SCHEMA)
    for one, weight in zip(updates, weights, strict=True):
        running.add(one, origin(one, weight))
    return running.finish([f"r{rank}" for rank in ranks])


def error(found: Tensors, wanted: dict[str, torch.Tensor]) -> float:
    return max(float((dense(found)[m] - wanted[m]).norm() / wanted[m].norm()) for m in MODULES)


WEIGHTS = [0.5, 0.3, 0.2]


@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 8, 4], [12, 12, 12]])
def test_low_rank_gives_the_weighted_mean_of_the_products(ranks: list[int]) -> None:
    updates = [update(rank, seed=seed) for seed, rank in enumerate(ranks)]
    outcome = fold(LowRank(), updates, WEIGHTS, sorted(set(ranks)))
    assert error(outcome.adapter, mean(updates, WEIGHTS)) < 1e-5


@pytest.mark.parametrize("ranks", [[4, 4], [2, 8]])
def test_low_rank_takes_a_change_since_an_older_broadcast_as_exactly(ranks: list[int]) -> None:
    whole, late = (update(rank, seed=seed) for seed, rank in enumerate(ranks))
    old, new = update(ranks[1], seed=7), begun(*ranks).broadcast[f"r{ranks[1]}"]
    outcome = fold(LowRank(), [whole, late, old, new], [0.6, 0.4, -0.4, 0.4], sorted(set(ranks)))
    assert error(outcome.adapter, mean([whole, late, old, new], [0.6, 0.4, -0.4, 0.4])) < 1e-5


def test_factor_mean_fails_what_low_rank_passes() -> None:
    updates = [update(4, seed=seed) for seed in range(3)]
    outcome = fold(FactorMean(), updates, WEIGHTS, [4])
    assert error(outcome.adapter, mean(updates, WEIGHTS)) > 0.1


def test_broadcast_and_residual_together_are_exact() -> None:
    updates = [update(rank, seed=rank) for rank in (2, 8, 4)]
    outcome = fold(LowRank(), updates, WEIGHTS, [2, 4, 8])
    whole = {m: dense(outcome.broadcast["r8"])[m] + dense(outcome.state["residual.r8"])[m] for m in MODULES}
    assert error(outcome.adapter, whole) < 1e-5
    assert {tier: rank(sent) for tier, sent in outcome.broadcast.items()} == {"r2": 2, "r4": 4, "r8": 8}


def test_one_site_is_passed_through_bit_for_bit() -> None:
    only = update(4, seed=1)
    outcome = fold(LowRank(), [only], [1.0], [4])
    assert all(torch.equal(outcome.adapter[key], only[key]) for key in only)
    assert all(torch.equal(outcome.broadcast["r4"][key], only[key]) for key in only)


def test_the_residual_of_a_round_is_in_the_next() -> None:
    first = [update(4, seed=seed) for seed in range(3)]
    outcome = fold(LowRank(), first, WEIGHTS, [4])
    running = LowRank().begin(outcome, SCHEMA)
    running.add(outcome.broadcast["r4"], Origin("ward", "r4", 1.0))  # a site that changed nothing
    again = running.finish(["r4"])
    assert error(again.adapter, mean(first, WEIGHTS)) < 1e-5


def flexlora(adapter: Tensors, ranks: list[int]) -> Tensors:
    """The mean of what sites of some ranks can hold of an adapter, which is all that FlexLoRA keeps of it."""
    held = [{m: split((adapter[f"{m}.B"], adapter[f"{m}.A"]), rank)[0] for m in MODULES} for rank in ranks]
    stacks = {m: stack([(one[m][0] / len(ranks), one[m][1]) for one in held]) for m in MODULES}
    return {f"{m}.{part}": factor for m, pair in stacks.items() for part, factor in zip("BA", pair, strict=True)}


def energy_above(rank: int, given: Tensors) -> float:
    """The share of the squared singular values after so many."""
    squares = [torch.linalg.svdvals(matrix).square() for matrix in dense(given).values()]
    return float(sum(one[rank:].sum() for one in squares) / sum(one.sum() for one in squares))


def test_ten_rounds_in_which_nobody_trains_change_nothing_whatever_the_ranks() -> None:
    ranks = [2, 4, 8]
    first = version = fold(LowRank(), [update(rank, seed=rank) for rank in ranks], WEIGHTS, ranks)
    theirs = first.adapter
    for _ in range(10):
        running = LowRank().begin(version, SCHEMA)
        for tier, sent in version.broadcast.items():
            running.add(sent, Origin("ward", tier, 1 / len(ranks)))
        version = running.finish([f"r{rank}" for rank in ranks])
        theirs = flexlora(theirs, ranks)
    assert error(version.adapter, dense(first.adapter)) < 1e-5
    above = energy_above(2, first.adapter)
    assert version.figures["energy_above_smallest_rank"] == pytest.approx(above, rel=1e-4)
    assert energy_above(2, theirs) < above / 10  # what is left to those who keep nothing of it


@pytest.mark.parametrize("ranks", [[4], [2, 4, 8]])
def test_the_energy_above_the_smallest_rank_is_told_where_ranks_differ(ranks: list[int]) -> None:
    outcome = fold(LowRank(), [update(rank, seed=rank) for rank in ranks], [1 / len(ranks)] * len(ranks), ranks)
    figure = outcome.figures.get("energy_above_smallest_rank")
    assert figure == (None if len(ranks) == 1 else pytest.approx(energy_above(2, outcome.adapter), rel=1e-5))


def test_memory_is_bounded_by_the_model_not_by_the_number_of_sites() -> None:
    running = LowRank().begin(begun(8), SCHEMA)
    updates = [update(8, seed=seed) for seed in range(100)]
    for one in updates:
        running.add(one, origin(one, 1 / 100))
    outcome = running.finish(["r8"])
    assert rank(outcome.adapter) <= min(OUT, IN)
    assert error(outcome.adapter, mean(updates, [1 / 100] * 100)) < 1e-6


@pytest.mark.parametrize("count", [3, 40])
def test_the_told_factor_error_is_the_true_one(count: int) -> None:
    updates, weights = [update(4, seed=seed) for seed in range(count)], [1 / count] * count
    wanted = mean(updates, weights)
    biased = dense(fold(FactorMean(), updates, weights, [4]).adapter)
    off = sum(float((biased[m] - wanted[m]).norm() ** 2) for m in MODULES)
    true = (off / sum(float(wanted[m].norm() ** 2) for m in MODULES)) ** 0.5
    told = fold(LowRank(), updates, weights, [4]).figures["factor_mean_error"]
    assert told == pytest.approx(true, rel=1e-4)


MIXED = SCHEMA | {
    "0.index": Field("I32", (3,), Rule.FIXED, "0", below=9),
    "0.values": Field("F32", (3,), Rule.MEAN, "0"),
}


def beside(given: Tensors, *, index: int = 1) -> Tensors:
    """An update that also holds what is no product."""
    values = given[f"{MODULES[0]}.A"][0, :3]
    return given | {"0.index": torch.tensor([index, 4, 8], dtype=torch.int32), "0.values": values}


@pytest.mark.parametrize("name", ["low-rank", "factor-mean"])
def test_each_tensor_of_an_adapter_is_folded_by_its_own_rule(name: str) -> None:
    strategy = aggregation.make(name, {})
    updates = [beside(update(4, seed=seed)) for seed in range(3)]
    running = strategy.begin(begun(4), MIXED)
    for one, weight in zip(updates, WEIGHTS, strict=True):
        running.add(one, origin(one, weight))
    outcome, alone = running.finish(["r4"]), fold(strategy, [update(4, seed=seed) for seed in range(3)], WEIGHTS, [4])
    values = sum(weight * one["0.values"] for one, weight in zip(updates, WEIGHTS, strict=True))
    for found in (outcome.adapter, outcome.broadcast["r4"]):
        torch.testing.assert_close(found["0.values"], values)
        assert torch.equal(found["0.index"], updates[0]["0.index"])
    assert all(torch.equal(outcome.adapter[key], tensor) for key, tensor in alone.adapter.items())


def test_an_index_that_differs_between_sites_and_shapes_that_do_are_refused_by_the_sites_name() -> None:
    running = aggregation.make("mean", {}).begin(begun(4), {key: MIXED[key] for key in ("0.index", "0.values")})
    running.add(beside(update(4, seed=0)), Origin("ward", "r4", 0.5))
    with pytest.raises(InputError, match="0.index is fixed, but another at bank than at others"):
        running.add(beside(update(4, seed=1), index=2), Origin("bank", "r4", 0.5))
    with pytest.raises(InputError, match=r"0.values is \[1\] at bank and \[3\] at others"):
        running.add(beside(update(4, seed=1)) | {"0.values": torch.ones(1)}, Origin("bank", "r4", 0.5))


def test_unknown_names_and_settings_are_refused_with_what_is_known() -> None:
    with pytest.raises(InputError, match="factor-mean, index-union, low-rank"):
        aggregation.make("fedavg", {})
    with pytest.raises(InputError, match="strategy 'low-rank' has no setting 'momentum'; its settings are tolerance"):
        aggregation.make("low-rank", {"momentum": 1})
