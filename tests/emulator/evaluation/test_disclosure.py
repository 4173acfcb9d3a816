from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.checkpoint import skeleton
from offsite.emulator.evaluation.disclosure import Disclosure, by_layer, disclosed
from offsite.emulator.evaluation.portion import Portion
from offsite.emulator.formats.int4 import Int4
from offsite.emulator.formats.packed import dense, pack
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.tuning.loop import trainable_copy


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def draft(base: Any, *kept: int, shared: dict[int, int] | None = None) -> Draft:
    outline = Outline(kept, (kept[0], kept[-1]), shared or {})
    return Draft(base, restack(base, outline.layers, outline.shared), outline)


def packed(given: Draft, *places: int) -> Draft:
    stack = layers(given.model)
    parts = {
        (place, path): Int4().encode(dense(stack[place].get_submodule(path)))
        for place in places
        for path in linears(stack[place])
    }
    return replace(given, model=pack(given.model, parts, Int4()))


def test_the_base_itself_is_disclosed_whole(family: str, tiny: Any) -> None:
    base = tiny(family)
    every = count(base)
    assert disclosed(draft(base, *range(6))) == Disclosure(every, 0, every)


def test_dropped_layers_are_what_is_not_disclosed(family: str, tiny: Any) -> None:
    base = tiny(family)
    missing = count(layers(base)[2]) + count(layers(base)[4])
    assert disclosed(draft(base, 0, 1, 3, 5)) == Disclosure(count(base) - missing, 0, count(base))


def test_shared_places_and_a_tied_head_count_once(tiny: Any) -> None:
    base = tiny("llama")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    found = disclosed(draft(base, *range(6), shared={2: 1, 3: 1}))
    assert found.verbatim == count(base) - 2 * count(layers(base)[0])


def test_tuned_layers_are_not_the_bases(tiny: Any) -> None:
    base = tiny()
    given = draft(base, 0, 1, 3, 5)
    trainable_copy(given.model, [1, 2])
    tuned = replace(given, tuned=(1, 2))
    assert disclosed(tuned).verbatim == disclosed(given).verbatim - 2 * count(layers(base)[0])
    assert disclosed(tuned).lossy == 0


def test_a_tuned_layer_that_others_share_is_not_the_bases_wherever_it_is(tiny: Any) -> None:
    base = tiny()
    given = draft(base, *range(6), shared={1: 2})  # the place that shares comes first
    trainable_copy(given.model, [2])
    assert disclosed(replace(given, tuned=(2,))).verbatim == count(base) - 2 * count(layers(base)[0])


def test_what_a_tuned_place_keeps_of_the_base_is_disclosed(tiny: Any) -> None:
    base = tiny()
    given = draft(base, 0, 1, 3, 5)
    parameters = trainable_copy(given.model, [1])
    norm = layers(base)[1].input_layernorm.weight
    layers(given.model)[1].input_layernorm.weight = norm  # say that this was not tuned
    trained = sum(parameter.numel() for parameter in parameters.values()) - norm.numel()
    assert disclosed(replace(given, tuned=(1,))).verbatim == disclosed(draft(base, 0, 1, 3, 5)).verbatim - trained


def test_kept_rows_of_an_untuned_layer_are_verbatim(tiny: Any) -> None:
    base = tiny()
    given = draft(base, 0, 1, 3, 5)
    before = disclosed(given).verbatim
    up = layers(given.model)[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight[torch.arange(0, 48, 2)].detach())  # half of (48, 32)
    assert disclosed(given).verbatim == before - 24 * 32


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gpt_neox"])
def test_packed_maps_are_lossy_and_their_biases_verbatim(name: str, tiny: Any) -> None:
    base = tiny(name)
    given = draft(base, 0, 1, 3, 5)
    layer = layers(base)[0]
    entries = sum(layer.get_submodule(path).get_parameter("weight").numel() for path in linears(layer))
    found, before = disclosed(packed(given, 1, 2)), disclosed(given)
    assert found == Disclosure(before.verbatim - 2 * entries, 2 * entries, count(base))


def test_packed_maps_that_are_shared_count_once_and_tuned_ones_not_at_all(tiny: Any) -> None:
    base = tiny()
    given = draft(base, *range(6), shared={2: 1, 3: 1})
    entries = sum(layers(base)[0].get_submodule(path).weight.numel() for path in linears(layers(base)[0]))
    assert disclosed(packed(given, 1)).lossy == entries
    assert disclosed(replace(packed(given, 1), tuned=(1,))).lossy == 0
    assert disclosed(replace(packed(given, 1, 4), tuned=(1,))).lossy == entries


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_whose_values_are_on_disk_is_counted_alike(name: str, tiny: Any) -> None:
    base = tiny(name)
    absent = skeleton(base.config, dtype=torch.float32)
    absent.tie_weights()
    assert disclosed(draft(absent, 0, 1, 3, 5)) == disclosed(draft(base, 0, 1, 3, 5))


def test_layer_by_layer_what_was_tuned_counts_too(tiny: Any) -> None:
    base = tiny()
    given = draft(base, 0, 1, 3, 5)
    layer = count(layers(base)[0])
    rest = count(base) - 6 * layer
    kept, gone = Portion(layer, 0, layer, ""), Portion(0, 0, layer, "")
    whole = {"0": kept, "1": kept, "2": gone, "3": kept, "4": gone, "5": kept, "": Portion(rest, 0, rest, "")}
    assert by_layer(given) == whole
    trainable_copy(given.model, [1])
    assert by_layer(replace(given, tuned=(1,))) == whole | {"1": Portion(0, layer, layer, "")}
