"""The curves of the learning rate: their closed forms, what they have in common, and what they refuse."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from transformers.trainer_utils import SchedulerType

from offsite.emulator import schedules
from offsite.emulator.schedules import SCHEDULES

STEPS, WARMUP = 12, 4
LEFT = STEPS - WARMUP

# Name, settings, and the share of the rate k steps after the warm-up, of which LEFT are taken.
CURVES: list[tuple[str, dict[str, Any], Callable[[int], float]]] = [
    ("constant", {}, lambda k: 1.0),
    ("linear", {}, lambda k: 1 - k / LEFT),
    ("cosine", {}, lambda k: (1 + math.cos(math.pi * k / LEFT)) / 2),
    ("cosine_with_min_lr", {"floor": 0.2}, lambda k: 0.2 + 0.8 * (1 + math.cos(math.pi * k / LEFT)) / 2),
    ("polynomial", {"power": 3.0, "floor": 0.1}, lambda k: 0.1 + 0.9 * (1 - k / LEFT) ** 3),
    ("inverse_sqrt", {}, lambda k: math.sqrt((WARMUP + 1) / (WARMUP + 1 + k))),
    ("inverse_sqrt", {"timescale": 2}, lambda k: math.sqrt(2 / (2 + k))),
    ("warmup_stable_decay", {"decay": 0.25}, lambda k: 1 - math.sqrt(max(0, k - 5) / 3)),
    ("warmup_stable_decay", {"decay": 0.25, "shape": "linear"}, lambda k: 1 - max(0, k - 5) / 3),
    (
        "warmup_stable_decay",
        {"decay": 0.5, "shape": "cosine"},
        lambda k: (1 + math.cos(math.pi * max(0, k - 3) / 5)) / 2,
    ),
]


def shares(name: str, *, steps: int = STEPS, warmup: int = WARMUP, **settings: Any) -> list[float]:
    curve = schedules.make(name, settings).curve(steps, warmup)
    return [curve(step) for step in range(steps)]


@pytest.mark.parametrize(("name", "settings", "curve"), CURVES)
def test_a_rate_rises_in_a_line_and_then_has_its_closed_form(
    name: str, settings: dict[str, Any], curve: Callable[[int], float]
) -> None:
    share = shares(name, **settings)
    assert share[:WARMUP] == [(step + 1) / (WARMUP + 1) for step in range(WARMUP)]
    assert share[WARMUP:] == pytest.approx([curve(k) for k in range(LEFT)], abs=1e-12)
    assert {name for name, *_ in CURVES} == set(SCHEDULES)


@pytest.mark.parametrize("warmup", [0, 1, 3, 20, 700])
def test_a_constant_rate_is_to_the_bit_the_line_that_ends_at_one(warmup: int) -> None:
    expected = [min(1.0, (step + 1) / (warmup + 1)) for step in range(20)]
    assert shares("constant", steps=20, warmup=warmup) == expected


def test_a_line_is_the_first_power_and_a_cosine_has_the_floor_zero() -> None:
    assert shares("polynomial", power=1.0) == pytest.approx(shares("linear"), abs=1e-15)
    assert shares("cosine_with_min_lr", floor=0.0) == shares("cosine")
    assert shares("polynomial", power=2.0) != pytest.approx(shares("linear"), abs=0.1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (7, 0), (7, 6), (400, 9), (3, 3), (4, 9)])
def test_every_step_trains_and_none_at_more_than_the_rate(name: str, steps: int, warmup: int) -> None:
    share = shares(name, steps=steps, warmup=warmup)
    assert 0 < min(share) and max(share) <= 1
    if warmup < steps:
        assert share[warmup] == 1
        assert share[warmup:] == sorted(share[warmup:], reverse=True)


@pytest.mark.parametrize("decay", [1e-9, 0.1, 1.0])
def test_the_rate_falls_in_the_last_steps_by_their_share(decay: float) -> None:
    share = shares("warmup_stable_decay", steps=LEFT, warmup=0, decay=decay)
    assert sum(one < 1 for one in share) == min(LEFT - 1, max(1, round(decay * LEFT)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_falls_after_the_warm_up_needs_a_step_after_it(name: str) -> None:
    schedule = schedules.make(name, {})
    schedule.fits(5, 4)
    if name == "constant":
        schedule.fits(5, 5)
    else:
        with pytest.raises(ValueError, match=rf"{name} falls after .*, and warmup_steps is 5 of 5 steps; give"):
            schedule.fits(5, 5)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cosine_with_min_lr", {"floor": 1.0}, "floor is a share of the learning rate, .*less than 1, got 1.0"),
        ("polynomial", {"floor": -0.1}, "floor is a share of the learning rate, at least 0"),
        ("polynomial", {"power": 0.0}, "power must be above 0, got 0.0"),
        ("inverse_sqrt", {"timescale": 0}, "timescale must be at least 1, got 0"),
        ("warmup_stable_decay", {"decay": 0.0}, "decay must be above 0 and at most 1, got 0.0"),
        ("warmup_stable_decay", {"shape": "steps"}, "shape: .*'1-sqrt'"),
        ("linear", {"floor": 0.1}, "schedule 'linear' has no setting 'floor'; its settings are none"),
        ("cosin", {}, "there is no schedule 'cosin' .did you mean cosine"),
        ("reduce_lr_on_plateau", {}, "follows a loss on held-out text"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schedules.make(name, settings)


def test_the_names_are_those_of_transformers() -> None:
    assert {*SCHEDULES, *SCHEDULES.refused} <= {kind.value for kind in SchedulerType}
