import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offsite.emulator import methods, modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.evaluation.attack import (
    HEALING_RATE,
    RATE,
    Attack,
    Attacker,
    attack,
    divided,
    family,
    most_steps,
    state_bytes,
    unfrozen,
)
from offsite.emulator.formats.int4 import Int4
from offsite.emulator.formats.packed import PackedLinear, dense, pack
from offsite.emulator.modality import Batch
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.tuning.loop import Schedule, tune


def packed(model: Any, *places: int) -> Any:
    stack = layers(model)
    parts = {
        (place, path): Int4().encode(dense(stack[place].get_submodule(path)))
        for place in places
        for path in linears(stack[place])
    }
    return pack(model, parts, Int4())


@pytest.fixture
def encoded() -> list[Tokens]:
    drawn = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(3)).tolist()
    return [Tokens(tuple(row), tuple(row)) for row in drawn]


@torch.no_grad()
def test_a_copy_in_which_all_trains_computes_the_same(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny(family)
    emulator = packed(restack(model, [0, 1, 3, 5], {2: 1}), 1)
    twin, parameters = unfrozen(emulator)
    torch.testing.assert_close(twin(ids).logits, emulator(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, PackedLinear) for module in twin.modules())
    assert set(parameters.values()) == set(twin.parameters())
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_the_copy_has_no_tensor_of_the_given_model_and_leaves_it_alone(tiny: Any) -> None:
    emulator = packed(restack(tiny().to(torch.bfloat16), [0, 1, 3, 5]), 1).requires_grad_(False)
    before = {name: value.clone() for name, value in emulator.state_dict().items()}
    twin, parameters = unfrozen(emulator)
    assert {tensor.dtype for tensor in [*twin.parameters(), *twin.buffers()]} == {torch.float32}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in emulator.state_dict().items())
    assert not any(parameter.requires_grad for parameter in emulator.parameters())
    assert isinstance(layers(emulator)[1].mlp.up_proj, PackedLinear)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_shared_stays_shared(name: str, dtype: torch.dtype, tiny: Any) -> None:
    model = tiny(name).to(dtype)
    emulator = packed(restack(model, [0, 1, 2, 3], {2: 1}), 1)
    twin, parameters = unfrozen(emulator)
    stack = layers(twin)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    for (path, one), (_, other) in zip(stack[1].named_parameters(), stack[2].named_parameters(), strict=True):
        assert one is other, path
    assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in restack(model, [0, 1, 3]).parameters())
    assert not {id(p) for p in stack[0].parameters()} & {id(p) for p in stack[1].parameters()}


def test_an_attack_trains_every_tensor_and_leaves_the_emulator(tiny: Any, encoded: list[Tokens]) -> None:
    emulator = packed(restack(tiny(), [0, 1, 3, 5]), 1)
    text = evaluation_batches(encoded, batch_size=8)
    before = modality.score(emulator, text)
    start, _ = unfrozen(emulator)
    ended = attack(emulator, encoded, Schedule(10, 3e-3, batch_size=8))
    assert not any(torch.equal(*pair) for pair in zip(start.parameters(), ended.parameters(), strict=True))
    assert modality.score(emulator, text) == before
    assert modality.score(ended, text).total < before.total


def test_unfreezing_beats_training_what_the_owner_meant_to_train(tiny: Any, encoded: list[Tokens]) -> None:
    emulator, schedule = restack(tiny(), [0, 1, 3, 5]), Schedule(10, 3e-3, batch_size=8)
    text = evaluation_batches(encoded, batch_size=8)
    attacked = modality.score(attack(emulator, encoded, schedule), text)
    meant, _ = unfrozen(emulator)
    ends: dict[str, nn.Parameter] = {
        f"{place}.{name}": value for place in (0, 3) for name, value in layers(meant)[place].named_parameters()
    }
    tune(meant, ends, encoded, schedule)
    assert attacked.total < modality.score(meant, text).total < modality.score(emulator, text).total


def test_the_text_of_an_attack_is_that_of_its_steps(tiny: Any, encoded: list[Tokens], text: list[Batch]) -> None:
    emulator, schedule = restack(tiny(), [0, 1, 3]), Schedule(3, 1e-3, batch_size=4)
    mine, _ = unfrozen(emulator)
    tune(mine, dict(mine.named_parameters()), encoded, schedule)
    assert modality.score(attack(emulator, encoded, schedule), text) == modality.score(mine, text)


# The family


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def counting(by: int) -> list[Tokens]:
    """A text that can be learned: each word is the one before and so many."""
    rows = [tuple(range(start, start + 10 * by, by)) for start in range(40, 60)]
    return [Tokens(row, row) for row in rows]


@pytest.fixture
def task() -> list[Tokens]:
    return counting(by=1)


@pytest.fixture
def public() -> list[Tokens]:
    return counting(by=-2)


def made(attacker: Attacker, attacks: tuple[Attack, ...]) -> dict[Attack, nn.Module]:
    """What each attack makes of an emulator, as it is when it is scored."""
    scored: dict[Attack, nn.Module] = {}
    attacker.make(attacks, lambda one, model: scored.update({one: copy.deepcopy(model)}))
    assert len(scored) == len(attacks)
    return scored


def test_the_family_is_every_start_and_text_at_one_and_four_times_the_steps() -> None:
    both = family(10, public=True, task=True)
    assert [one.name for one in both] == [
        "heal 20",
        *("heal 20, unfreeze 10", "heal 20, unfreeze 40"),
        *("unfreeze 10", "unfreeze 40"),
        *("tuned, unfreeze 10", "tuned, unfreeze 40"),
    ]
    assert most_steps(both) == 20 + 3 * 40
    assert [one.name for one in family(10, starts=["emulator"], public=True, task=False)] == ["heal 10", "heal 40"]
    assert [one.name for one in family(10, starts=["emulator"], public=False, task=True, longest=1)] == ["unfreeze 10"]
    with pytest.raises(ValueError, match="there is neither"):
        family(10, public=False, task=False)


def test_without_an_early_end_an_attack_is_plain_training_of_all_weights(tiny: Any, task: list[Tokens]) -> None:
    emulator, schedule = restack(tiny(), [0, 1, 3]), Schedule(3, 1e-3, batch_size=4)
    plain, parameters = unfrozen(emulator)
    tune(plain, parameters, task, schedule)
    assert same(attack(emulator, task, schedule), plain)


def test_a_tenth_is_held_back_at_random_and_nothing_else_decides_when_to_end(tiny: Any, public: list[Tokens]) -> None:
    kept, held_back = divided(public, seed=1)
    assert (len(kept), len(held_back)) == (18, 2) and {*kept, *held_back} == {*public}
    assert divided(public, seed=1) == (kept, held_back) != divided(public, seed=2)
    with pytest.raises(ValueError, match="at least two examples"):
        divided(public[:1], seed=1)
    # On a text that training cannot make likelier the held-back tenth ends it at once; the start is the best moment.
    emulator = restack(tiny(), [0, 1, 3])
    heard: list[int] = []
    attacked = attack(emulator, public, Schedule(40, 0.5, seed=1), patience=4, tell=lambda step, *_: heard.append(step))
    assert heard[-1] == 4 and same(attacked, unfrozen(emulator)[0])


def test_the_held_back_tenth_is_not_trained_on(tiny: Any, public: list[Tokens]) -> None:
    emulator, schedule = restack(tiny(), [0, 1, 3]), Schedule(4, 1e-3, batch_size=18)  # each step sees all that is left
    kept, held_back = divided(public, seed=0)
    other = [one if one in kept else Tokens((5, 6, 7), (5, 6, 7)) for one in public]
    seen: list[list[float]] = [[], []]
    for losses, text in zip(seen, (public, other), strict=True):
        attack(emulator, text, schedule, patience=99, tell=lambda _, __, loss, losses=losses: losses.append(loss))  # type: ignore[misc]
    assert seen[0] == seen[1] and len(seen[0]) == 4


@pytest.mark.slow
def test_the_shorter_attack_is_the_beginning_of_the_longer(tiny: Any, task: list[Tokens], public: list[Tokens]) -> None:
    emulator = restack(tiny(), [0, 1, 3])
    attacker = Attacker({"emulator": emulator}, steps=4, task=task, public=public, rate=3e-3, healing_rate=3e-3)
    scored = made(attacker, family(4, starts=["emulator"], public=True, task=True))
    for one, model in scored.items():
        assert same(made(attacker, (one,))[one], model), one.name
    healed = attack(emulator, public, Schedule(8, 3e-3), patience=4)
    assert same(scored[Attack(healing=8)], healed)
    assert same(scored[Attack(healing=8, steps=4)], attack(healed, task, Schedule(4, 3e-3), patience=4))


def test_a_longer_attack_is_no_worse_by_the_tenth_that_it_held_back(tiny: Any, task: list[Tokens]) -> None:
    attacker = Attacker({"emulator": restack(tiny(), [0, 1, 3])}, steps=4, task=task, rate=3e-3)
    scored = made(attacker, (Attack(), *family(4, starts=["emulator"], public=False, task=True)))
    exam = evaluation_batches(divided(task, seed=0)[1], batch_size=8)
    start, short, long = (modality.score(model, exam).total for model in scored.values())
    assert long < short < start


def test_a_tuned_emulator_is_attacked_with_its_adapter(tiny: Any, task: list[Tokens]) -> None:
    emulator, method, places = restack(tiny(), [0, 1, 3]), methods.make("lora", {}), {0: 0, 2: 3}
    tuned = method.attach(copy.deepcopy(emulator), places, method.start(emulator, places, seed=0))
    tune(tuned, method.named_parameters(tuned, places), task, Schedule(4, 1e-2))
    attacker = Attacker({"emulator": emulator, "tuned": tuned}, steps=4, task=task, rate=3e-3)
    text = evaluation_batches(task, batch_size=8)
    scored = made(attacker, (Attack("tuned"), Attack("tuned", steps=4)))
    begun, ended = (modality.score(model, text).total for model in scored.values())
    assert begun == modality.score(tuned, text).total and ended < begun
    assert sum(parameter.numel() for parameter in unfrozen(tuned)[1].values()) > sum(
        parameter.numel() for parameter in emulator.parameters()
    )


@pytest.mark.parametrize("killed_at", [("heal", 5), ("unfreeze 8", 2), ("unfreeze 8", 9), ("unfreeze 0", 16)])
def test_killed_attacks_go_on_with_what_is_left(
    tiny: Any, task: list[Tokens], public: list[Tokens], tmp_path: Path, killed_at: tuple[str, int]
) -> None:
    class Killed(Exception):
        pass

    def kill(what: str, step: int, steps: int, loss: float) -> None:
        if killed_at[0] in what and step == killed_at[1]:
            raise Killed

    attacker = Attacker(
        {"emulator": restack(tiny(), [0, 1, 3])}, steps=4, task=task, public=public, rate=3e-3, healing_rate=3e-3
    )
    attacks = family(4, starts=["emulator"], public=True, task=True)
    whole, scored = made(attacker, attacks), dict[Attack, nn.Module]()

    def keep(one: Attack, model: nn.Module) -> None:
        assert one not in scored
        scored[one] = copy.deepcopy(model)

    with pytest.raises(Killed):
        replace(attacker, state=tmp_path, tell=kill).make(attacks, keep)
    heard: list[int] = []
    going_on = replace(attacker, state=tmp_path, tell=lambda _, step, *__: heard.append(step))
    going_on.make([one for one in attacks if one not in scored], keep)
    assert all(same(scored[one], model) for one, model in whole.items())
    assert len(heard) < most_steps(attacks) - killed_at[1] // 4 * 4 + 1


@pytest.mark.parametrize(
    ("texts", "states"), [({"public": True, "task": True}, 3), ({"public": True, "task": False}, 2)]
)
def test_states_take_the_disk_that_is_said_and_no_more(
    tiny: Any,
    task: list[Tokens],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: dict[str, bool],
    states: int,
) -> None:
    def replace(*names: Path) -> None:
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
        whole(*names)

    sizes, whole = list[int](), os.replace
    monkeypatch.setattr("offsite.emulator.tuning.state.os.replace", replace)
    emulator, attacks = packed(restack(tiny(), [0, 1, 3]), 1), family(2, starts=["emulator"], **texts)
    attacker = Attacker({"emulator": emulator}, steps=2, task=task, public=task, state=tmp_path)
    attacker.make(attacks, lambda *_: None)
    said = state_bytes(emulator, attacks)
    assert said == states * 5 * 4 * sum(parameter.numel() for parameter in unfrozen(emulator)[1].values())
    assert 0.9 * said < max(sizes) < 1.1 * said, "names and what is kept in numbers count at this size"


def test_rates_suit_whole_layers_unless_they_are_given(tiny: Any, task: list[Tokens]) -> None:
    emulator = restack(tiny(), [0, 1, 3])
    by_default = Attacker({"emulator": emulator}, steps=2, task=task, public=task)
    given = replace(by_default, rate=RATE, healing_rate=HEALING_RATE)
    one = Attack(healing=2, steps=2)
    assert same(made(by_default, (one,))[one], made(given, (one,))[one])
