"""Training an adapter so that it can be killed; that it is a site's training is shown beside the engines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.emulator import methods
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.optimisers import OPTIMISERS
from offsite.emulator.tuning import adapting
from offsite.emulator.tuning.adapting import adapted
from offsite.protos.spec import Choice, LocalTraining

RULES = LocalTraining(
    steps=5,
    batch_size=2,
    learning_rate=1e-2,
    warmup_steps=2,
    schedule=Choice(name="linear"),
    weight_decay=0.1,
    seed=3,
)
PLACES = {1: 1, 4: 4}


class Killed(Exception):
    pass


@pytest.fixture
def adapter(tiny: Any) -> Callable[..., dict[str, Tensor]]:
    """Adapt a model that has dropout; return the adapter."""
    drawn = torch.randint(3, 90, (5, 12), generator=torch.Generator().manual_seed(1)).tolist()
    text = [Tokens(tuple(row), tuple(row)) for row in drawn]

    def adapt(rules: LocalTraining = RULES, **options: Any) -> dict[str, Tensor]:
        model, method = tiny(), methods.make("lora", {"rank": 2})
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        return method.state(adapted(model, method, PLACES, text, rules, **options), PLACES)

    return adapt


@pytest.mark.parametrize("schedule", ["constant", "cosine", "warmup_stable_decay"])
def test_the_rounds_of_a_run_have_the_rates_of_one_long_round(schedule: str) -> None:
    whole = replace(RULES, steps=12, warmup_steps=3, schedule=Choice(name=schedule))
    parts = [replace(whole, steps=4, before=4 * number, after=8 - 4 * number) for number in range(3)]
    assert [share for part in parts for share in adapting.shares(part)] == adapting.shares(whole)


@pytest.mark.parametrize(
    ("moment", "optimiser"),
    [
        *((moment, "adamw") for moment in (1, 2, 5)),
        *((3, name) for name in OPTIMISERS if name != "adamw"),
    ],
)
def test_killed_after_any_step_it_goes_on_to_the_same_bytes(
    adapter: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
    optimiser: str,
) -> None:
    rules = replace(RULES, optimiser=Choice(name=optimiser))

    def tell(step: int, steps: int, loss: float) -> None:
        told.append(step)
        if len(told) == moment:
            raise Killed

    monkeypatch.setattr(adapting, "EVERY", 1)
    told: list[int] = []
    with pytest.raises(Killed):
        adapter(rules, state=tmp_path / "state", tell=tell)
    torch.rand(3)  # the next process has drawn otherwise
    again, whole = adapter(rules, state=tmp_path / "state", tell=tell), adapter(rules)
    assert told == [1, 2, 3, 4, 5], "no step was taken twice"
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_state_of_other_rules_is_refused(adapter: Callable[..., dict[str, Tensor]], tmp_path: Path) -> None:
    adapter(state=tmp_path / "state")
    with pytest.raises(ValueError, match="is of other work"):
        adapter(replace(RULES, learning_rate=2e-2), state=tmp_path / "state")
    with pytest.raises(ValueError, match="is of other work"):
        adapter(replace(RULES, schedule=Choice(name="cosine")), state=tmp_path / "state")
