from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator import builders, modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import is_transposed, layers, linears, shape
from offsite.emulator.builders import Material
from offsite.emulator.builders.quantised import Quantised
from offsite.emulator.formats.packed import PackedLinear, dense
from offsite.emulator.methods import make
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.placements import Ends, Kept

SHARED = Outline(layers=(0, 1, 2, 3, 4, 5), trainable=(0, 5), shared={1: 2, 4: 3})


def drafted(base: nn.Module, outline: Outline = SHARED) -> Draft:
    return Draft(base, restack(base, outline.layers, outline.shared), outline)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def packed_places(model: nn.Module) -> list[int]:
    found = []
    for place, layer in enumerate(layers(model)):
        kinds = {isinstance(layer.get_submodule(path), PackedLinear) for path in linears(layer)}
        assert len(kinds) == 1
        found += [place] if kinds == {True} else []
    return found


def unpacked(draft: Draft, places: list[int]) -> nn.Module:
    """The draft's model with every map of the places replaced by what is stored of it."""
    outline = draft.outline
    twin = restack(
        draft.base, [outline.layers[outline.shared.get(place, place)] for place in range(len(outline.layers))]
    )
    for place, layer in enumerate(layers(twin)):
        for path in linears(layer) if place in places else []:
            linear: Any = layer.get_submodule(path)
            weight = dense(layers(draft.model)[place].get_submodule(path))
            linear.weight = nn.Parameter(weight.T.contiguous() if is_transposed(linear) else weight)
    return twin


@torch.no_grad()
def test_a_packed_emulator_computes_what_its_decoded_weights_do(family: str, tiny: Any, ids: Tensor) -> None:
    base = tiny(family)
    before, given = copies(base), drafted(base)
    draft = Quantised(block=16, layers="all").change(given, Material())
    assert packed_places(draft.model) == [0, 1, 2, 3, 4, 5] and packed_places(given.model) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    logits = draft.model(ids).logits
    torch.testing.assert_close(logits, unpacked(draft, packed_places(draft.model))(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, given.model(ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_trains_is_not_packed_and_is_the_bases(tiny: Any, ids: Tensor) -> None:
    base = tiny("gpt2")
    draft = Quantised(block=16).change(drafted(base), Material())
    assert packed_places(draft.model) == [1, 2, 3, 4]
    known = {id(parameter) for parameter in base.parameters()}
    assert all(id(parameter) in known for parameter in draft.model.parameters())  # biases and norms too
    logits = draft.model(ids).logits
    torch.testing.assert_close(logits, unpacked(draft, [1, 2, 3, 4])(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_shared_places_use_the_packed_tensors_of_their_source_also_after_restacking(
    family: str, tiny: Any, ids: Tensor
) -> None:
    model = Quantised(block=16).change(drafted(tiny(family)), Material()).model
    again = restack(model, range(6))
    for stack in (layers(model), layers(again)):
        for place, source in SHARED.shared.items():
            assert stack[place] is not stack[source]
            for path in linears(stack[place]):
                twins: list[Any] = [stack[at].get_submodule(path) for at in (place, source)]
                assert twins[0] is not twins[1]
                assert all(twins[0].parts[name] is part for name, part in twins[1].parts.items())
                assert twins[0].bias is twins[1].bias
    assert torch.equal(again(ids).logits, model(ids).logits)
    # As a bundle does it: the distinct layers alone, then the stack again.
    distinct = restack(model, SHARED.own)
    stored = [SHARED.own.index(SHARED.shared.get(place, place)) for place in range(6)]
    assert torch.equal(restack(distinct, stored)(ids).logits, model(ids).logits)


def test_lora_trains_on_a_packed_emulator_and_merges_into_the_base(family: str, tiny: Any, text: Any) -> None:
    base, method = tiny(family), make("lora", {"rank": 3})
    outline = Outline(layers=(0, 2, 3, 5), trainable=(0, 5))
    draft = Quantised(block=16, layers="all").change(drafted(base, outline), Material())
    adapter = method.start(draft.model, outline.places, seed=0)
    of_base = method.start(base, {0: 0, 5: 5}, seed=0)
    assert adapter.keys() == of_base.keys()
    assert all(torch.equal(value, of_base[key]) for key, value in adapter.items())

    attached = method.attach(draft.model, outline.places, adapter)
    live = method.named_parameters(attached, outline.places)
    assert {p.dtype for p in live.values()} == {torch.float32}
    optimizer = torch.optim.SGD(live.values(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = modality.loss(attached, text[0])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    trained = method.state(attached, outline.places)
    assert all(not torch.equal(trained[key], adapter[key]) for key in trained if key.endswith(".B"))

    before = {
        (at, path): dense(layers(base)[at].get_submodule(path)).clone() for at in range(6) for path in paths(base)
    }
    method.merge(base, method.recover(trained, draft.recovery))
    for (at, path), weight in before.items():
        found = dense(layers(base)[at].get_submodule(path))
        change = torch.zeros_like(weight)
        if at in (0, 5):
            change = 16 / 3 * trained[f"{at}.{path}.B"] @ trained[f"{at}.{path}.A"]
        torch.testing.assert_close(found, weight + change)


def paths(model: nn.Module) -> list[str]:
    return linears(layers(model)[0])


def test_where_every_layer_trains_there_is_nothing_frozen_to_pack(tiny: Any) -> None:
    base = tiny("llama", 4)
    chain = [builders.make("uniform", {"keep": 3}), builders.make("quantised", {})]
    with pytest.raises(ValueError, match='every layer of the emulator trains; say layers="all".*QLoRA'):
        builders.run(chain, Kept(), base, Material())
    chain[1] = builders.make("quantised", {"layers": "all"})
    assert packed_places(builders.run(chain, Kept(), base, Material()).model) == [0, 1, 2]


def test_it_follows_builders_of_depth_and_may_be_the_first(tiny: Any) -> None:
    base = tiny("llama", 6)
    draft = builders.run([builders.make("quantised", {"format": "int4"})], Ends(1, 1), base, Material())
    assert packed_places(draft.model) == [1, 2, 3, 4]
    linear: Any = layers(draft.model)[1].get_submodule(paths(base)[0])
    assert linear.format.name == "int4" and linear.format.block == 64
    with pytest.raises(ValueError, match="cannot follow quantised"):
        builders.check([builders.make("quantised", {}), builders.make("uniform", {})])


def test_each_layer_is_packed_once_and_told(tiny: Any) -> None:
    told: list[tuple[str, int, int]] = []
    material = Material(tell=lambda what, step, steps: told.append((what, step, steps)))
    Quantised(layers="all").change(drafted(tiny("llama")), material)
    assert told == [("quantised", step, 4) for step in (1, 2, 3, 4)]  # of six places two are shared


def test_a_bad_block_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="block must be at least 1"):
        builders.make("quantised", {"block": 0})


def test_frozen_layers_take_less_than_a_third_of_what_they_take_in_bf16(tiny: Any) -> None:
    base = tiny("llama", 6)
    stack = layers(Quantised().change(drafted(base), Material()).model)
    for path in paths(base):
        linear: Any = stack[2].get_submodule(path)
        d_out, d_in = shape(linear)
        assert sum(part.nbytes for part in linear.parts.values()) < 0.32 * 2 * d_out * d_in
