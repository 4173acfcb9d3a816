from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders import run
from offsite.emulator.builders.base import Material
from offsite.emulator.builders.distilled import Distilled
from offsite.emulator.builders.loram import Loram
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.methods.blocks import Blocks
from offsite.emulator.methods.lora import Lora
from offsite.emulator.modality import Batch, collate
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.placements import Kept
from offsite.emulator.tuning import distil
from offsite.emulator.tuning.distil import Border, borders, distance

ENDS = Outline((0, 2, 4, 5), (0, 5))
QUICK = Distilled(steps=16, learning_rate=5e-3, warmup_steps=2)


class Killed(Exception):
    pass


@pytest.fixture
def encoded() -> list[Tokens]:
    drawn = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    return [Tokens(tuple(row[:size]), tuple(row[:size])) for size, row in enumerate(drawn, 13)]


def draft_of(base: nn.Module, outline: Outline) -> Draft:
    return Draft(base, restack(base, outline.layers, outline.shared), outline)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def equal_layers(model: nn.Module, place: int, base: nn.Module, layer: int) -> bool:
    return same(layers(model)[place].state_dict(), layers(base)[layer].state_dict())


def measured(teacher: nn.Module, student: nn.Module, outline: Outline, text: Batch, *, kd: float, lm: float) -> float:
    ends = borders(outline, outline.frozen, len(layers(teacher)))
    with torch.no_grad():
        return float(distil.loss(teacher.eval(), ends, kd_weight=kd, lm_weight=lm)(student.eval(), text))


def test_a_border_is_where_a_tuned_stretch_ends() -> None:
    assert borders(ENDS, ENDS.frozen, 6) == [Border(2, 4)]
    spread = Outline((0, 2, 3, 5, 7, 8), (0, 3, 8))
    assert borders(spread, spread.frozen, 9) == [Border(1, 2), Border(4, 7)]
    bottom = Outline((0, 1, 4, 6), (0, 1))
    assert borders(bottom, bottom.frozen, 8) == [Border(3, 7)]
    shared = Outline((0, 1, 2, 3, 4, 5), (0, 5), {2: 1, 4: 5})
    assert borders(shared, shared.frozen, 6) == [Border(4, 4)]
    narrowed = Outline((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5))
    assert borders(narrowed, [1, 3, 4], 6) == [Border(1, 1), Border(4, 4)]


def test_distance_is_that_of_the_tokens_in_units_of_the_teacher() -> None:
    taught = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    padded = taught + 100 * (1 - mask)[..., None]
    assert distance(padded, taught, mask) == 0
    torch.testing.assert_close(distance(0 * taught, taught, mask), torch.tensor(1.0))
    torch.testing.assert_close(distance(30 * taught, 10 * taught, mask), torch.tensor(4.0))


def test_what_is_compared_is_the_hidden_state_between_layers(tiny: Any, family: str, ids: Tensor) -> None:
    model = tiny(family)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        hooks = [len(layer._forward_hooks) for layer in layers(model)]
        with distil.outputs(model, [1, 3]) as found:
            model(input_ids=ids)
    assert torch.equal(found[1], states[2]) and torch.equal(found[3], states[4])
    assert [len(layer._forward_hooks) for layer in layers(model)] == hooks


def test_an_emulator_of_all_layers_starts_at_distance_0(tiny: Any, family: str, encoded: list[Tokens]) -> None:
    base = tiny(family)
    every = Outline(tuple(range(6)), (0, 3, 5))
    text = collate(encoded)
    assert measured(base, draft_of(base, every).model, every, text, kd=1, lm=0) == 0
    dropped = Outline((0, 2, 3, 5), (0, 3, 5))
    assert measured(base, draft_of(base, dropped).model, dropped, text, kd=1, lm=0) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_distilling_brings_the_frozen_layers_closer_and_leaves_the_others(
    tiny: Any, family: str, encoded: list[Tokens]
) -> None:
    base = tiny(family).to(torch.bfloat16)
    draft = draft_of(base, ENDS)
    untouched, given = tensors(base), tensors(draft.model)
    heard: list[tuple[str, int, int]] = []
    found = QUICK.change(draft, Material(samples=encoded, tell=lambda *told: heard.append(told)))
    assert heard == [("distilled", step, 16) for step in range(1, 17)]
    assert found.tuned == (1, 2) and found.outline == ENDS and not found.recovery
    assert same(tensors(base), untouched) and same(tensors(draft.model), given)
    assert equal_layers(found.model, 0, base, 0) and equal_layers(found.model, 3, base, 5)
    assert not equal_layers(found.model, 1, base, 2) and not equal_layers(found.model, 2, base, 4)
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in layers(found.model).parameters())
    text = collate(encoded)
    for kd, lm, share in ((1, 0, 0.8), (0, 1, 1)):
        before = measured(base, draft.model, ENDS, text, kd=kd, lm=lm)
        assert measured(base, found.model, ENDS, text, kd=kd, lm=lm) < share * before


def test_each_stretch_between_layers_that_train_is_distilled(tiny: Any, encoded: list[Tokens]) -> None:
    base = tiny("llama", 9)
    outline = Outline((0, 2, 3, 5, 7, 8), (0, 3, 8))
    draft = draft_of(base, outline)
    found = replace(QUICK, lm_weight=0.0).change(draft, Material(samples=encoded))
    assert found.tuned == (1, 3, 4)
    assert all(equal_layers(found.model, place, base, layer) for place, layer in outline.places.items())
    with torch.no_grad():
        batch = collate(encoded)
        states = []
        for model, at in ((base, (2, 7)), (draft.model, (1, 4)), (found.model, (1, 4))):
            with distil.outputs(model, at) as outputs:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            states.append([outputs[place] for place in at])
    taught, before, after = states
    for border in range(2):
        apart = [distance(one[border], taught[border], batch.attention_mask) for one in (before, after)]
        assert apart[1] < 0.8 * apart[0]


def test_places_that_share_are_tuned_together(tiny: Any, encoded: list[Tokens]) -> None:
    outline = Outline((0, 1, 2, 3, 4, 5), (0, 5), {2: 1, 4: 5})
    base = tiny()
    found = replace(QUICK, steps=3).change(draft_of(base, outline), Material(samples=encoded))
    assert found.tuned == (1, 3)
    assert equal_layers(found.model, 2, found.model, 1) and not equal_layers(found.model, 1, base, 1)
    assert equal_layers(found.model, 4, base, 5)
    before, after = (layers(found.model)[place].state_dict() for place in (1, 2))
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)


def test_killed_and_gone_on_is_undisturbed(tiny: Any, encoded: list[Tokens], tmp_path: Path) -> None:
    heard: list[int] = []

    def kill_at(last: int) -> Callable[[str, int, int], None]:
        def tell(what: str, step: int, steps: int) -> None:
            heard.append(step)
            if step == last:
                raise Killed

        return tell

    builder = replace(QUICK, steps=22)
    draft = draft_of(tiny(), ENDS)
    with pytest.raises(Killed):
        builder.change(draft, Material(samples=encoded, scratch=tmp_path, tell=kill_at(21)))
    gone_on = builder.change(draft, Material(samples=encoded, scratch=tmp_path, tell=kill_at(99)))
    assert heard == [*range(1, 22), 21, 22]
    whole = builder.change(draft, Material(samples=encoded))
    assert same(tensors(gone_on.model), tensors(whole.model))
    heard.clear()
    with pytest.raises(Killed):  # at its own first step: the state is not taken for that of other settings
        replace(builder, kd_weight=0.0).change(draft, Material(samples=encoded, scratch=tmp_path, tell=kill_at(1)))
    assert heard == [1]


def test_where_every_layer_trains_those_that_were_narrowed_are_tuned(tiny: Any, encoded: list[Tokens]) -> None:
    base = tiny()
    quiet = Material(samples=encoded)
    pruned, found = (run(chain, Kept(), base, quiet) for chain in ([Loram()], [Loram(), QUICK]))
    assert found.outline.frozen == [] and found.tuned == (2, 3)
    assert all(equal_layers(found.model, place, base, place) for place in (0, 1, 4, 5))
    assert same(found.recovery, pruned.recovery)
    assert (
        modality.score(found.model, [collate(encoded)]).total < modality.score(pruned.model, [collate(encoded)]).total
    )


class Plain:
    """A format that stores the matrix as it is."""

    name = "plain"
    trained = ()

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"matrix": ((d_out, d_in), torch.float32)}

    def decode(self, parts: Any, d_out: int, d_in: int) -> Tensor:
        return parts["matrix"]  # type: ignore[no-any-return]


def test_what_cannot_be_distilled_says_why(tiny: Any, encoded: list[Tokens]) -> None:
    base = tiny()
    every = draft_of(base, Outline(tuple(range(6)), tuple(range(6))))
    with pytest.raises(ValueError, match="nothing to distil: every layer trains and is the base's"):
        QUICK.change(every, Material(samples=encoded))
    with pytest.raises(ValueError, match="public text"):
        QUICK.change(draft_of(base, ENDS), Material())
    draft = draft_of(base, ENDS)
    attention: Any = layers(draft.model)[2].self_attn
    weight = attention.q_proj.weight.detach()
    attention.q_proj = PackedLinear(Plain(), {"matrix": weight}, None, d_out=32, d_in=32)
    with pytest.raises(ValueError, match=r"self_attn.q_proj of layer 4 is packed .*distilled before what packs it"):
        QUICK.change(draft, Material(samples=encoded))
    with pytest.raises(ValueError, match="kd_weight and lm_weight"):
        Distilled(kd_weight=0.0, lm_weight=0.0)


@pytest.mark.parametrize("method", [Lora(rank=2), Blocks()])
def test_realigning_brings_the_emulator_closer_beside_the_adapter(
    tiny: Any, encoded: list[Tokens], tmp_path: Path, method: Lora | Blocks
) -> None:
    base = tiny()
    emulator = draft_of(base, ENDS).model
    adapter = method.start(emulator, ENDS.places, seed=0)
    generator = torch.Generator().manual_seed(2)
    adapter = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in adapter.items()}
    untouched, given = tensors(base), tensors(emulator)
    quiet = Material(samples=encoded, scratch=tmp_path)

    def align(adapter: dict[str, Tensor]) -> nn.Module:
        draft = Draft(base, emulator, ENDS)
        again = QUICK.realigned(draft, quiet, steps=QUICK.steps, method=method, adapter=adapter, recovered=adapter)
        assert again.tuned == (1, 2) and again.base is base
        return again.model

    found = align(adapter)
    assert same(tensors(base), untouched) and same(tensors(emulator), given)
    assert tensors(found).keys() == given.keys()  # no adapter in it
    assert equal_layers(found, 0, base, 0) and equal_layers(found, 3, base, 5)
    assert not equal_layers(found, 1, base, 2) and not equal_layers(found, 2, base, 4)
    teacher = method.attach(restack(base, range(6)), {0: 0, 5: 5}, adapter)
    before, after = (
        measured(
            teacher, method.attach(restack(model, range(4)), ENDS.places, adapter), ENDS, collate(encoded), kd=1, lm=0
        )
        for model in (emulator, found)
    )
    assert after < 0.8 * before
    other = align({key: 2 * value for key, value in adapter.items()})  # the state of the first is not taken for its own
    assert not same(tensors(other), tensors(found))
