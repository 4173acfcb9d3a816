import math
from typing import Any

import pytest
import torch
from torch import nn

from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.batches import Batch, Encoded, evaluation_batches
from offsite.emulator.evaluation.attack import Attack, attack, protection, unfrozen
from offsite.emulator.formats.int4 import Int4
from offsite.emulator.formats.packed import PackedLinear, dense, pack
from offsite.emulator.likelihood import Likelihood, likelihood
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
def encoded() -> list[Encoded]:
    drawn = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(3)).tolist()
    return [Encoded(tuple(row), tuple(row)) for row in drawn]


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


def test_an_attack_trains_every_tensor_and_leaves_the_emulator(tiny: Any, encoded: list[Encoded]) -> None:
    emulator = packed(restack(tiny(), [0, 1, 3, 5]), 1)
    text = evaluation_batches(encoded, batch_size=8)
    before = likelihood(emulator, text)
    start, _ = unfrozen(emulator)
    ended = attack(emulator, encoded, Schedule(10, 3e-3, batch_size=8))
    assert not any(torch.equal(*pair) for pair in zip(start.parameters(), ended.parameters(), strict=True))
    assert likelihood(emulator, text) == before
    assert likelihood(ended, text).nll < before.nll


def test_unfreezing_beats_training_what_the_owner_meant_to_train(tiny: Any, encoded: list[Encoded]) -> None:
    emulator, schedule = restack(tiny(), [0, 1, 3, 5]), Schedule(10, 3e-3, batch_size=8)
    text = evaluation_batches(encoded, batch_size=8)
    attacked = likelihood(attack(emulator, encoded, schedule), text)
    meant, _ = unfrozen(emulator)
    ends: dict[str, nn.Parameter] = {
        f"{place}.{name}": value for place in (0, 3) for name, value in layers(meant)[place].named_parameters()
    }
    tune(meant, ends, encoded, schedule)
    assert attacked.nll < likelihood(meant, text).nll < likelihood(emulator, text).nll


def at(mean: float) -> Likelihood:
    return Likelihood(100 * mean, 100)


def test_nothing_is_protected_unless_a_threshold_is_stated() -> None:
    found = protection({"unfreeze": Attack(at(9), at(9))}, plug_in=at(2), base=at(3))
    assert (found.label, found.threshold) == ("not protected", None)
    assert "no threshold was stated" in found.reason


def test_margins_are_the_least_over_attacks_in_nats_of_perplexity() -> None:
    plug_in, base = Likelihood(40, 20), Likelihood(60, 20)
    attacks = {"unfreeze": Attack(at(2.5), at(5)), "heal": Attack(at(3.5), at(3.25))}
    found = protection(attacks, plug_in=plug_in, base=base)
    assert found.task == pytest.approx(math.log(attacks["unfreeze"].task.perplexity / plug_in.perplexity))
    assert found.general == pytest.approx(math.log(attacks["heal"].general.perplexity / base.perplexity))
    assert (found.task, found.general, found.margin) == pytest.approx((0.5, 0.25, 0.25))
    assert "'unfreeze' comes within 0.50 nats of the plug-in" in found.reason
    assert "'heal' comes within 0.25 nats of the base" in found.reason


@pytest.mark.parametrize(("threshold", "label"), [(0.25, "protected"), (0.26, "not protected")])
@pytest.mark.parametrize("weakest", ["task", "general"])
@pytest.mark.parametrize("first", [True, False])
def test_protected_means_that_every_margin_of_every_attack_reaches_the_threshold(
    threshold: float, label: str, weakest: str, first: bool
) -> None:
    weak = Attack(at(2.25), at(9)) if weakest == "task" else Attack(at(9), at(2.25))
    pair = [("weak", weak), ("strong", Attack(at(9), at(9)))]
    found = protection(dict(pair if first else pair[::-1]), plug_in=at(2), base=at(2), threshold=threshold)
    assert found.label == label
    assert f"{threshold:g} nats" in found.reason


def test_an_attack_that_beats_the_plug_in_is_said_so() -> None:
    found = protection({"unfreeze": Attack(at(1.9), at(9))}, plug_in=at(2), base=at(3), threshold=0.01)
    assert found.label == "not protected" and found.task == pytest.approx(-0.1)
    assert "'unfreeze' is better than the plug-in on the task's text, by 0.10 nats" in found.reason


@pytest.mark.parametrize("mean", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["task", "general"])
def test_an_attack_that_failed_protects_nothing(mean: float, part: str) -> None:
    failed = Attack(at(mean), at(9)) if part == "task" else Attack(at(9), at(mean))
    with pytest.raises(ValueError, match="heal: the likelihood is (nan|inf)"):
        protection({"unfreeze": Attack(at(9), at(9)), "heal": failed}, plug_in=at(2), base=at(3), threshold=0.3)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_anything_reaches_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        protection({"unfreeze": Attack(at(9), at(9))}, plug_in=at(2), base=at(3), threshold=threshold)


def test_protection_without_an_attack_is_refused() -> None:
    with pytest.raises(ValueError, match="none was given"):
        protection({}, plug_in=at(2), base=at(3), threshold=0.3)


def test_the_text_of_an_attack_is_that_of_its_steps(tiny: Any, encoded: list[Encoded], text: list[Batch]) -> None:
    emulator, schedule = restack(tiny(), [0, 1, 3]), Schedule(3, 1e-3, batch_size=4)
    mine, _ = unfrozen(emulator)
    tune(mine, dict(mine.named_parameters()), encoded, schedule)
    assert likelihood(attack(emulator, encoded, schedule), text) == likelihood(mine, text)
