"""What each retention computes, against its formula, on adapters of a few numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.emulator import retention
from offsite.emulator.retention.hold import Hold
from offsite.kernels.schema import Field, Rule, Schema, factors, settle

KEYS = ("0.map.A", "0.map.B")
SCHEMA: Schema = {
    "0.map.A": Field("F32", (None, 6), Rule.PRODUCT, "0.map"),
    "0.map.B": Field("F32", (5, None), Rule.PRODUCT, "0.map"),
}


def adapter(seed: int, rank: int = 2) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {KEYS[0]: torch.randn(rank, 6, generator=random), KEYS[1]: torch.randn(5, rank, generator=random)}


def live(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key: torch.nn.Parameter(tensor.clone()) for key, tensor in tensors.items()}


def product(tensors: Any) -> Tensor:
    return tensors[KEYS[1]] @ tensors[KEYS[0]]


def test_ewc_is_nothing_at_the_anchor_and_its_gradient_is_fisher_times_the_distance() -> None:
    held: Any = retention.make("ewc", {"strength": 3.0})
    before, fisher = adapter(0), {key: tensor.square() for key, tensor in adapter(1).items()}
    anchor = held.anchor(before, SCHEMA, held.remember(before, SCHEMA, {"fisher": fisher}))
    assert float(held.penalty(live(before), anchor).detach()) == 0.0
    values = live(adapter(2))
    held.penalty(values, anchor).backward()
    for key, value in values.items():
        torch.testing.assert_close(value.grad, 3.0 * fisher[key] * (value.detach() - before[key]))


def test_ewc_never_pays_for_moving_away() -> None:
    held: Any = retention.make("ewc", {})
    before = adapter(0)
    anchor = held.anchor(before, SCHEMA, {"fisher": {key: -torch.ones_like(one) for key, one in before.items()}})
    assert float(held.penalty(live(adapter(2)), anchor).detach()) == 0.0


def test_ewc_refuses_fisher_information_of_another_adapter() -> None:
    held = retention.make("ewc", {})
    with pytest.raises(ValueError, match="not of 0.map.A"):
        held.anchor(adapter(0), SCHEMA, {"fisher": adapter(0, rank=3)})


def test_orthogonal_is_nothing_for_any_change_that_earlier_tasks_inputs_do_not_see() -> None:
    held: Any = retention.make("orthogonal", {"strength": 2.0})
    before = adapter(0)
    kept = held.remember(before, SCHEMA, {})
    anchor, Q = held.anchor(before, SCHEMA, kept), kept["basis"]["0.map"]
    torch.testing.assert_close(Q @ Q.T, torch.eye(2))
    torch.testing.assert_close(before[KEYS[0]] @ Q.T @ Q, before[KEYS[0]])
    beside = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    values = {KEYS[0]: before[KEYS[0]] + beside - beside @ Q.T @ Q, KEYS[1]: before[KEYS[1]]}
    assert (
        float(held.penalty(live(values), anchor).detach()) < 1e-10 < float((product(values) - product(before)).norm())
    )
    other = adapter(2)
    expected = 2.0 * ((product(other) - product(before)) @ Q.T).square().sum()
    torch.testing.assert_close(held.penalty(live(other), anchor).detach(), expected)


def test_orthogonal_does_not_ask_which_factors_a_product_is_written_as() -> None:
    held: Any = retention.make("orthogonal", {})
    before, other = adapter(0), adapter(2)
    turn = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    again = {KEYS[0]: turn @ other[KEYS[0]], KEYS[1]: other[KEYS[1]] @ torch.linalg.inv(turn)}
    anchor = held.anchor(before, SCHEMA, held.remember(before, SCHEMA, {}))
    torch.testing.assert_close(held.penalty(live(again), anchor), held.penalty(live(other), anchor))


def test_orthogonal_remembers_the_directions_of_every_task_once() -> None:
    held = retention.make("orthogonal", {})
    first, second = adapter(0), adapter(1)
    kept = held.remember(second, SCHEMA, held.remember(first, SCHEMA, {}))
    Q = kept["basis"]["0.map"]
    assert Q.shape == (4, 6)
    for task in (first, second):
        torch.testing.assert_close(product(task) @ Q.T @ Q, product(task))
    torch.testing.assert_close(held.remember(first, SCHEMA, kept)["basis"]["0.map"], Q)
    untrained = first | {KEYS[1]: torch.zeros(5, 2)}
    assert held.remember(untrained, SCHEMA, {})["basis"]["0.map"].shape == (0, 6)


def test_surgery_pulls_once_to_the_mean_of_all_earlier_tasks() -> None:
    held: Any = retention.make("surgery", {"alpha": 0.1})
    tasks, state = [adapter(seed) for seed in range(3)], {}
    for task in tasks:
        state = held.remember(task, SCHEMA, state)
    mean = {key: torch.stack([task[key] for task in tasks]).mean(0) for key in KEYS}
    anchor, values, start = held.anchor(tasks[-1], SCHEMA, state), live(adapter(5)), adapter(5)
    Hold(held, values, anchor).pull()
    for key in KEYS:
        torch.testing.assert_close(values[key].detach(), start[key] + 0.1 * (mean[key] - start[key]))


@pytest.mark.parametrize("name", ["distil", "ewc", "orthogonal", "surgery"])
def test_an_anchor_is_what_is_expected_of_a_tiers_schema(name: str) -> None:
    held, before = retention.make(name, {}), adapter(0)
    kept = held.remember(before, SCHEMA, {"fisher": before})
    anchor = held.anchor(before, SCHEMA, kept)
    expected = held.expects(settle(SCHEMA, {key: tensor.shape for key, tensor in before.items()}))
    assert settle(expected, {key: tensor.shape for key, tensor in anchor.items()}).keys() == anchor.keys()
    assert factors(SCHEMA)


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ("distil", "strength"),
        ("distil", "temperature"),
        ("ewc", "strength"),
        ("orthogonal", "strength"),
        ("replay", "share"),
        ("surgery", "alpha"),
    ],
)
def test_settings_out_of_range_are_refused(recipe: str, word: str) -> None:
    for value in (-1.0, 1e12):
        with pytest.raises(ValueError, match=word):
            retention.make(recipe, {word: value})


def test_a_reservoir_is_the_same_for_a_seed_and_holds_any_row_as_likely_as_any_other() -> None:
    held: Any = retention.make("replay", {"rows": 4, "share": 0.25})
    assert held.sample(range(3), seed=0) == [0, 1, 2]
    assert held.sample(range(20), seed=5) == held.sample(range(20), seed=5) != held.sample(range(20), seed=6)
    counts, draws = [0] * 20, 4000
    for seed in range(draws):
        kept = held.sample(range(20), seed=seed)
        assert len({*kept}) == 4
        for row in kept:
            counts[row] += 1
    expected = draws * 4 / 20
    chi = sum((count - expected) ** 2 / (expected * 0.8) for count in counts)
    assert chi < 43.8  # of 19 degrees of freedom, one seed set of a thousand is beyond it
    assert [held.rehearsed(size) for size in (2, 4, 8, 64)] == [1, 1, 2, 16]
