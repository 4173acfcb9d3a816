"""How fast methods adapt a model, and the rates at which they do so alike."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from offsite.emulator.methods import make
from offsite.emulator.modality import Sample, encode
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.tuning.loop import Schedule
from offsite.emulator.tuning.speed import NEAR, STEPS, Trial, calibrated

PLACES = {0: 0, 2: 2}
METHODS = ("lora", "bottleneck", "ssf")  # a product, a net behind the map, and a scale


@pytest.fixture
def samples(tokenizer: Any) -> list[Sample]:
    texts = (" ".join(f"w{3 + (7 * row + at) % 80}" for at in range(10)) for row in range(8))
    return encode([TextExample("", text) for text in texts], tokenizer, max_length=12)


def trial(name: str, model: Any, samples: list[Sample]) -> Trial:
    method = make(name, {})
    return Trial(model, method, PLACES, method.start(model, PLACES, seed=0), samples)


def test_methods_adapt_alike_at_calibrated_rates_and_far_from_alike_at_one_rate(
    tiny: Any, samples: list[Sample]
) -> None:
    same, alike, rates = list[float](), list[float](), set[float]()
    for name in METHODS:
        one = trial(name, tiny(layers=3), samples)
        same.append(one.speed(Schedule(STEPS, 1e-3)))
        rate = calibrated(one, 0.02, Schedule(STEPS, make(name, {}).rate))
        alike.append(one.speed(Schedule(STEPS, rate)))
        rates.add(rate)
    assert max(same) > 3 * min(same) and len(rates) == len(METHODS)
    assert max(alike) <= NEAR**2 * min(alike), dict(zip(METHODS, alike, strict=True))


def test_a_trial_begins_anew_each_time_and_moves_nothing_at_no_rate_to_speak_of(
    tiny: Any, samples: list[Sample]
) -> None:
    one = trial("lora", tiny(layers=3), samples)
    first, again = (one.speed(Schedule(STEPS, 1e-2)) for _ in range(2))
    assert first == again > one.speed(Schedule(STEPS, 1e-9)) >= -1e-6
    assert one.speed(Schedule(STEPS, 1e30)) == math.inf


@dataclass
class Powered:
    """Moves as a power of the rate, and no further than a bound."""

    power: float = 2.0
    most: float = math.inf

    def speed(self, schedule: Schedule) -> float:
        return min((10 * schedule.learning_rate) ** self.power, self.most)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("first", [1e-5, 1e-3, 1.0])
def test_a_rate_is_found_whatever_power_of_it_a_trial_moves_by(power: float, first: float) -> None:
    of: Any = Powered(power)
    rate = calibrated(of, 0.04, Schedule(STEPS, first))
    assert (10 * rate) ** power == pytest.approx(0.04, rel=NEAR - 1)


def test_a_speed_that_no_rate_has_is_refused() -> None:
    stuck: Any = Powered(most=0.01)
    with pytest.raises(
        ValueError, match=r"moves the emulator's predictions by 0.04 nats in 8 steps .*\(0.001: 0.0001, "
    ):
        calibrated(stuck, 0.04, Schedule(STEPS, 1e-3))
