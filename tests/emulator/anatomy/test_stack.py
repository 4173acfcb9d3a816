from itertools import chain
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, text_config

DROPPED = ([0, 2, 5], {})
SHARED = ([0, 1, 2, 3, 4, 5], {1: 2, 3: 2, 4: 5})


@torch.no_grad()
def test_all_layers_in_order_give_bit_identical_logits(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny(family)
    assert torch.equal(restack(model, range(6))(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_stack_is_the_model_its_configuration_describes(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny(family)
    sources = [0, 2, 2, 3, 5, 5, 1]
    expected = AutoModelForCausalLM.from_config(restack(model, sources).config).eval()
    expected.load_state_dict(model.state_dict(), strict=False)
    for layer, source in zip(layers(expected), sources, strict=True):
        layer.load_state_dict(layers(model)[source].state_dict())
    assert torch.equal(restack(model, sources)(ids).logits, expected(ids).logits)


def test_lists_with_an_entry_per_layer_follow_the_layers(tiny: Any) -> None:
    model = tiny("gemma2")
    types = model.config.layer_types
    assert restack(model, [1, 3, 4]).config.layer_types == [types[1], types[3], types[4]]


@torch.no_grad()
def test_a_deeper_stack_gives_other_logits(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny(family)
    deeper = restack(model, [0, 1, 2, 3, 4, 5, 5, 5])
    assert text_config(deeper).num_hidden_layers == len(layers(deeper)) == 8
    assert not torch.allclose(deeper(ids).logits, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("plan", [DROPPED, SHARED, ([0, 3, 3, 3, 5, 1, 5, 2], {})])
def test_generating_with_a_cache_is_generating_without(family: str, tiny: Any, ids: torch.Tensor, plan: Any) -> None:
    model = restack(tiny(family), *plan)
    with_cache, without = (
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0, eos_token_id=None)
        for use in (True, False)
    )
    assert with_cache.shape == (2, 22)
    assert torch.equal(with_cache, without)


def test_places_share_tensors_and_never_modules(family: str, tiny: Any) -> None:
    model = tiny(family)
    stack = layers(restack(model, *SHARED))
    assert len({id(module) for layer in stack for module in layer.modules()}) == sum(
        len(list(layer.modules())) for layer in stack
    )
    for place, source in enumerate([0, 2, 2, 2, 5, 5]):
        mine = chain(stack[place].parameters(), stack[place].buffers())
        theirs = chain(layers(model)[source].parameters(), layers(model)[source].buffers())
        assert all(a is b for a, b in zip(mine, theirs, strict=True))
        numbers = {module.layer_idx for module in stack[place].modules() if hasattr(module, "layer_idx")}
        assert numbers == {place}


@torch.no_grad()
def test_the_given_model_is_left_as_it_was(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny(family)
    config, modules, logits = model.config.to_dict(), list(model.modules()), model(ids).logits
    restack(model, *DROPPED)
    restack(model, *SHARED)
    assert model.config.to_dict() == config
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize(
    ("positions", "shared", "fault"),
    [
        ([], {}, r"positions must name layers in 0..5, got \[\]"),
        ([0, 6], {}, r"positions must name layers in 0..5, got \[0, 6\]"),
        ([0, 1], {1: 2}, r"shared must map places in 0..1, got \{1: 2\}"),
    ],
)
def test_places_that_do_not_exist_are_refused(tiny: Any, positions: Any, shared: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        restack(tiny(), positions, shared)


def test_layers_that_know_their_number_are_not_moved(tiny: Any) -> None:
    model = tiny("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="its layers cannot be moved"):
        restack(model, [0, 2])
