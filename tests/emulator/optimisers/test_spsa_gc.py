"""SPSA-GC: its estimate and its steps in closed form, its draws, and how well it trains beside SPSA."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator import optimisers
from offsite.emulator.optimisers import Estimator
from offsite.emulator.optimisers.spsa_gc import Perturbation
from offsite.emulator.seeds import generator


def made(
    *parameters: nn.Parameter, seed: int = 0, first_step: int = 0, lr: float = 0.01, **settings: Any
) -> Perturbation:
    optimizer = optimisers.make("spsa-gc", settings).make(
        parameters, learning_rate=lr, weight_decay=0.1, seed=seed, first_step=first_step
    )
    assert isinstance(optimizer, Perturbation) and isinstance(optimizer, Estimator)
    return optimizer


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator(0, "start"))) for shape in ((5, 7), (3,))]


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_of_a_line_the_estimate_is_the_slope_along_each_direction_and_leaves_no_bit_changed() -> None:
    place = parameters()
    before, line = flat(place).clone(), torch.randn(38, generator=generator(1, "line")).double()
    optimizer = made(*place, draws=3)
    directions = [flat(optimizer.directions(draw)) for draw in range(3)]
    assert all(bool(((one.abs() >= 0.5) & (one.abs() <= 1)).all()) for one in directions)
    losses: list[float] = []

    def loss() -> float:
        losses.append(float(flat(place).double() @ line))
        return losses[-1]

    told = optimizer.estimate(loss)
    assert len(losses) == 6 and told == pytest.approx(sum(losses) / 6) == pytest.approx(float(before.double() @ line))
    assert torch.equal(flat(place), before)
    expected = sum((one.double() @ line) / one.double() for one in directions) / 3
    torch.testing.assert_close(flat([one.grad for one in place]).double(), expected, rtol=1e-3, atol=1e-3)


def test_steps_have_their_closed_form() -> None:
    place = parameters()
    optimizer = made(*place, lr=0.2, momentum=0.5, alpha=0.4, offset=2.0)
    expected, moment = flat(place).clone(), torch.zeros(38)
    for number in (1, 2, 3):
        for one in place:
            one.grad = torch.full_like(one, float(number))
        optimizer.step()
        moment = 0.5 * moment + number
        gain = 0.2 / (number + 2.0) ** 0.4
        expected = expected * (1 - gain * 0.1) - gain * (number + 0.5 * moment)
        torch.testing.assert_close(flat(place), expected)


def test_draws_come_of_the_seed_and_the_step_alone() -> None:
    def drawn(seed: int = 0, first_step: int = 0, steps: int = 0, draw: int = 0) -> Tensor:
        place = parameters()
        optimizer = made(*place, seed=seed, first_step=first_step)
        for _ in range(steps):
            torch.rand(1)
            optimizer.estimate(lambda: 0.0)
            optimizer.step()
        return flat(optimizer.directions(draw))

    assert torch.equal(drawn(), drawn()) and torch.equal(drawn(first_step=5), drawn(first_step=3, steps=2))
    others = [drawn(seed=1), drawn(first_step=1), drawn(steps=2), drawn(draw=1)]
    assert not any(torch.equal(drawn(), other) for other in others)


def test_both_losses_of_a_draw_have_the_same_dropout_and_two_draws_have_not() -> None:
    seen: list[float] = []

    def loss() -> float:
        seen.append(float(torch.rand(1)))
        return 0.0

    made(*parameters(), draws=2).estimate(loss)
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_what_fails_meanwhile_leaves_the_parameters_as_they_were() -> None:
    place = parameters()
    before = flat(place).clone()

    def loss() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        made(*place).estimate(loss)
    assert torch.equal(flat(place), before)


def logistic(momentum: float) -> float:
    """Return the loss after 400 steps on a logistic problem of 200 dimensions."""
    draw = generator(0, "problem")
    x, weights = torch.randn(500, 200, generator=draw), torch.randn(200, generator=draw)
    place, y = nn.Parameter(torch.zeros(200)), (x @ weights > 0).float()
    optimizer = made(place, momentum=momentum, draws=2)

    def loss() -> float:
        return float(functional.binary_cross_entropy_with_logits(x @ place.detach(), y))

    for _ in range(400):
        optimizer.estimate(loss)
        optimizer.step()
    return loss()


def test_the_correction_trains_further_on_the_same_schedule() -> None:
    plain = logistic(0.0)
    assert plain < 0.65 and logistic(0.9) <= 0.75 * plain


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draws": 0}, "draws must be in 1..64"),
        ({"perturbation": 0.0}, "perturbation must be in 1e-6..1"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"alpha": 2.0}, "alpha and gamma in 0..1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimisers.make("spsa-gc", settings)
