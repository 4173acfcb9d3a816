from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator.tuning.best import Best


def watched(losses: list[float], **rule: float) -> tuple[nn.Parameter, Best]:
    """One number under watch, and the losses that its looks will find, one after the other."""
    weight, script = nn.Parameter(torch.zeros(1)), iter(losses)
    return weight, Best({"w": weight}, lambda: next(script), **({"every": 1, "patience": 2} | rule))  # type: ignore[arg-type]


def walk(weight: nn.Parameter, best: Best, values: Iterator[float]) -> int:
    for step, value in enumerate(values, start=1):
        if best.enough():
            return step - 1
        weight.data.fill_(value)
        best.after(step)
    return step


def test_the_best_moment_is_the_least_loss_of_start_last_and_averaged_weights() -> None:
    for losses, value in (
        ([1.0, 5.0, 5.0, 5.0, 5.0], 0.0),  # the start
        ([9.0, 1.0, 5.0, 5.0, 5.0], 4.0),  # the last after step 1
        ([9.0, 8.0, 8.0, 2.0, 1.0], 6.0),  # the mean of 4 and 8 after step 2
        ([float("nan"), 8.0, 8.0, 2.0, 3.0], 8.0),  # a start without a likelihood is the worst there is
    ):
        weight, best = watched(losses)
        walk(weight, best, iter([4.0, 8.0]))
        best.restore()
        assert weight.item() == value, losses


def test_looking_at_the_average_leaves_the_weights() -> None:
    weight, best = watched([9.0] * 5)
    walk(weight, best, iter([4.0, 8.0]))
    assert weight.item() == 8.0 and weight.is_leaf


def test_the_average_is_the_mean_of_all_steps_and_a_moving_one_once_they_are_many() -> None:
    weight, best = watched([9.0] * 99, patience=99, averaging=0.75)
    values = [3.0, 5.0, 10.0, 2.0, 7.0, 1.0]
    walk(weight, best, iter(values[:4]))
    average = best.tensors["average.w"]
    assert average.item() == pytest.approx(sum(values[:4]) / 4)
    before = average.item()
    best.after(5)  # of the weights after step 4, once more
    assert average.item() == pytest.approx(0.75 * before + 0.25 * values[3])


def test_weights_that_do_not_move_are_their_own_average_bit_for_bit() -> None:
    held = torch.randn(64, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(held.clone())
    best = Best({"w": weight}, lambda: 1.0, every=99, patience=99)
    for step in range(1, 40):
        best.after(step)
    assert torch.equal(best.tensors["average.w"], held)


def test_it_has_enough_after_so_many_steps_without_a_better_moment() -> None:
    losses = [9.0, *[8.0] * 2, *[9.0] * 2, *[7.0] * 2, *[9.0] * 99]  # better at steps 1 and 3
    weight, best = watched(losses, patience=3)
    assert walk(weight, best, iter(map(float, range(1, 40)))) == 6
    best.restore()
    assert weight.item() == 3.0


def test_it_looks_only_every_so_many_steps() -> None:
    seen: list[Tensor] = []
    weight = nn.Parameter(torch.zeros(1))

    def loss() -> float:
        seen.append(weight.detach().clone())
        return 1.0

    walk(weight, Best({"w": weight}, loss, every=3, patience=99), iter(map(float, range(1, 8))))
    assert [value.item() for value in seen] == [0.0, 3.0, 2.0, 6.0, 3.5]  # the start; last and average, twice


def test_what_is_asked_for_after_a_step_sees_the_best_until_then_and_training_goes_on_from_its_own() -> None:
    seen: dict[int, float] = {}
    losses = [9.0, 3.0, 9.0, 9.0, 9.0, 2.0, 9.0, 9.0, 9.0]
    weight, script = nn.Parameter(torch.zeros(1)), iter(losses)
    at = {step: partial(lambda step: seen.update({step: weight.item()}), step) for step in (2, 3, 7)}
    best = Best({"w": weight}, lambda: next(script), every=1, patience=99, at=at)
    walk(weight, best, iter([1.0, 2.0, 3.0, 4.0]))
    assert (seen, weight.item()) == ({2: 1.0, 3: 3.0}, 4.0)
    best.restore()
    assert (seen, weight.item()) == ({2: 1.0, 3: 3.0, 7: 3.0}, 3.0)
