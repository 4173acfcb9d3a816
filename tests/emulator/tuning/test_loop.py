from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import evaluation_batches, training_batches
from offsite.emulator.modality import Batch
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.tuning.best import Best
from offsite.emulator.tuning.loop import Schedule, trainable_copy, tune

SCHEDULE = Schedule(8, 1e-2, batch_size=2, warmup_steps=2, decay="cosine", weight_decay=0.1, seed=3)


class Killed(Exception):
    pass


@pytest.fixture
def encoded() -> list[Tokens]:
    drawn = torch.randint(3, 90, (5, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [Tokens(tuple(row[:size]), tuple(row[:size])) for size, row in enumerate(drawn, 8)]


def copy_of(model: nn.Module, places: list[int]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    twin = restack(model, range(len(layers(model))))
    return twin, trainable_copy(twin, places)


def values(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_tuning_is_plain_adamw_on_the_seeded_batches(tiny: Any, encoded: list[Tokens]) -> None:
    schedule = Schedule(3, 1e-2, batch_size=2, seed=3)
    model, parameters = copy_of(tiny(), [2, 3])
    losses = tune(model, parameters, encoded, schedule)
    plain, expected = copy_of(tiny(), [2, 3])
    optimizer = torch.optim.AdamW(expected.values(), lr=1e-2, weight_decay=0.0)
    for at, batch in enumerate(training_batches(encoded, batch_size=2, steps=3, first_step=0, seed=3)):
        found = modality.loss(plain, batch)
        assert losses[at] == pytest.approx(float(found.detach()), rel=1e-6)
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(expected.values(), 1.0)
        optimizer.step()
    for name, value in values(parameters).items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_given_parameters_change(tiny: Any, family: str, dtype: torch.dtype, encoded: list[Tokens]) -> None:
    base = tiny(family).to(dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, parameters = copy_of(base, [1, 4])
    start = values(parameters)
    losses = tune(model, parameters, encoded, SCHEDULE)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert same(before, dict(base.state_dict()))
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    for name, value in start.items():
        assert not torch.equal(value, parameters[name]) or "bias" in name, name  # a bias of keys has no effect
    given = {id(parameter) for parameter in parameters.values()}
    assert all(p.requires_grad == (id(p) in given) for p in model.parameters())


@pytest.mark.parametrize("killed_after", [1, 7, 8])
def test_killed_and_gone_on_is_undisturbed(tiny: Any, encoded: list[Tokens], tmp_path: Path, killed_after: int) -> None:
    def kill(step: int, steps: int, loss: float) -> None:
        if step == killed_after:
            raise Killed

    model, whole = copy_of(tiny(), [2, 3])
    losses = tune(model, whole, encoded, SCHEDULE, state=tmp_path / "whole", every=3)
    model, parameters = copy_of(tiny(), [2, 3])
    with pytest.raises(Killed):
        tune(model, parameters, encoded, SCHEDULE, state=tmp_path / "state", every=3, tell=kill)
    heard: list[int] = []
    model, parameters = copy_of(tiny(), [2, 3])
    gone_on = tune(
        model,
        parameters,
        encoded,
        SCHEDULE,
        state=tmp_path / "state",
        every=3,
        tell=lambda step, *_: heard.append(step),
    )
    last_saved = 8 if killed_after == 8 else killed_after // 3 * 3
    assert heard == list(range(last_saved + 1, 9))
    assert gone_on == losses
    assert same(values(parameters), values(whole))
    assert (tmp_path / "state").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "whole"]


def test_a_state_of_other_work_is_refused(tiny: Any, encoded: list[Tokens], tmp_path: Path) -> None:
    state = tmp_path / "state"
    model, parameters = copy_of(tiny(), [2])
    tune(model, parameters, encoded, SCHEDULE, state=state)
    others = {
        "schedule": (tiny(), [2], encoded, replace(SCHEDULE, seed=4)),
        "places": (tiny(), [3], encoded, SCHEDULE),
        "text": (tiny(), [2], encoded[1:], SCHEDULE),
        "model": (tiny("qwen3"), [2], encoded, SCHEDULE),
    }
    for base, places, text, schedule in others.values():
        model, parameters = copy_of(base, places)
        with pytest.raises(ValueError, match="of other work: .*remove it"):
            tune(model, parameters, text, schedule, state=state)
    state.write_bytes(state.read_bytes()[:100])
    model, parameters = copy_of(tiny(), [2])
    with pytest.raises(ValueError, match="not a state of tuning: .*remove it"):
        tune(model, parameters, encoded, SCHEDULE, state=state)


def test_a_loss_that_is_not_finite_names_its_step(tiny: Any, encoded: list[Tokens]) -> None:
    seen: list[Batch] = []

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(batch)
        return modality.loss(model, batch) * (1 if len(seen) < 3 else float("nan"))

    model, parameters = copy_of(tiny(), [2])
    with pytest.raises(ValueError, match=r"loss of step 3 of 8 is nan; a lower learning_rate may help"):
        tune(model, parameters, encoded, SCHEDULE, loss=broken)


def test_matrices_decay_and_vectors_do_not(tiny: Any, encoded: list[Tokens]) -> None:
    def flat(model: nn.Module, batch: Batch) -> Tensor:
        return torch.stack([parameter.sum() for parameter in model.parameters() if parameter.requires_grad]).sum() * 0

    model, parameters = copy_of(tiny("gpt2"), [2])
    start = values(parameters)
    tune(model, parameters, encoded, Schedule(2, 0.1, weight_decay=0.5), loss=flat)
    for name, value in start.items():
        expected = value * (1 - 0.1 * 0.5) ** 2 if value.ndim == 2 else value
        torch.testing.assert_close(parameters[name].detach(), expected)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    schedule = Schedule(12, 1.0, warmup_steps=4, decay="cosine")
    assert [schedule.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.rate(8) == pytest.approx(0.5)
    assert 0 < schedule.rate(11) < 0.05
    assert {replace(schedule, decay="none").rate(step) for step in range(4, 12)} == {1.0}


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_size": 0}, {"warmup_steps": 9}, {"learning_rate": 0.0}, {"weight_decay": -1.0}]
)
def test_a_schedule_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(SCHEDULE, **wrong)


def test_parameters_that_places_share_stay_shared(tiny: Any, encoded: list[Tokens]) -> None:
    base = tiny()
    model = restack(base, range(6), {2: 1, 4: 3})
    parameters = trainable_copy(model, [1, 3])
    assert {name.split(".")[0] for name in parameters} == {"1", "3"}
    tune(model, parameters, encoded, SCHEDULE)
    stack = layers(model)
    for own, other in ((1, 2), (3, 4)):
        for ours, theirs in zip(stack[own].parameters(), stack[other].parameters(), strict=True):
            assert ours is theirs
    for place in (0, 5):
        assert all(p is q for p, q in zip(stack[place].parameters(), layers(base)[place].parameters(), strict=True))


def test_what_trains_must_be_fp32(tiny: Any, encoded: list[Tokens]) -> None:
    model = tiny().to(torch.bfloat16)
    with pytest.raises(ValueError, match="must be torch.float32"):
        tune(model, dict(layers(model)[0].named_parameters()), encoded, SCHEDULE)


@pytest.mark.parametrize("killed_after", [4, 7])
def test_what_an_observer_keeps_is_killed_and_goes_on_with_the_training(
    tiny: Any, encoded: list[Tokens], tmp_path: Path, killed_after: int
) -> None:
    def trained(state: Path, tell: Any = None) -> dict[str, Tensor]:
        model, parameters = copy_of(tiny(), [2, 3])
        exam = evaluation_batches(encoded[:2], batch_size=2)
        best = Best(parameters, lambda: modality.score(model, exam).total, every=2, patience=99)
        tune(model, parameters, encoded[2:], SCHEDULE, state=state, every=3, observer=best, tell=tell)
        return {**values(parameters), **best.tensors}

    def kill(step: int, steps: int, loss: float) -> None:
        if step == killed_after:
            raise Killed

    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "state", kill)
    assert same(trained(tmp_path / "state"), whole)
    assert (tmp_path / "state").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_observer_that_has_had_enough_ends_the_training(tiny: Any, encoded: list[Tokens]) -> None:
    model, parameters = copy_of(tiny(), [2])
    losses = tune(model, parameters, encoded, SCHEDULE, observer=Best(parameters, lambda: 1.0, every=1, patience=3))
    model, parameters = copy_of(tiny(), [2])
    assert losses == tune(model, parameters, encoded, SCHEDULE)[:3], "and changes nothing before"
