from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from offsite.emulator.anatomy.narrow import Units, channels, fit, groups, narrow
from offsite.emulator.anatomy.roles import TABLE, heads, roles
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, linears, shape

LLAMA = TABLE["Llama, Qwen, Mistral, Gemma"]


def units_of(model: Any, place: int) -> list[Units]:
    """The channels and, where some may go, the KV groups."""
    layer, found = layers(model)[place], roles(model, place)
    return [channels(layer, found)] + ([] if found.alibi else [groups(layer, found, heads(model))])


def test_every_row_and_column_belongs_to_one_unit(family: str, tiny: Any) -> None:
    model = tiny(family)
    layer = layers(model)[0]
    for units in units_of(model, 0):
        everything = torch.arange(units.count)
        for path, rows in units.rows(everything).items():
            assert torch.equal(rows, torch.arange(shape(layer.get_submodule(path))[0]))
        columns = shape(layer.get_submodule(units.after.path))[1]
        assert torch.equal(units.columns(everything), torch.arange(columns))


@torch.no_grad()
def test_a_kv_group_owns_the_rows_that_its_keys_come_from(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Moving only the key rows of a group moves the keys of this group in the cache, and no other's."""
    if family == "bloom":
        return
    model = tiny(family, 2)
    before = model(ids, use_cache=True).past_key_values.layers[0].keys
    units = groups(layers(model)[0], roles(model, 0), heads(model))
    _, key, _ = units.before
    linear = layers(model)[0].get_submodule(key.path)
    weight = linear.weight.T if family == "gpt2" else linear.weight
    weight[key.index[1]] *= -2
    after = model(ids, use_cache=True).past_key_values.layers[0].keys
    moved = [not torch.equal(before[:, group], after[:, group]) for group in range(units.count)]
    assert moved == [group == 1 for group in range(units.count)]


def test_the_heads_of_bloom_are_fixed_by_their_slopes(tiny: Any) -> None:
    model = tiny("bloom")
    with pytest.raises(ValueError, match=r"see positions by their number \(ALiBi\), so none may go"):
        groups(layers(model)[0], roles(model, 0), heads(model))


def test_attention_with_parameters_for_all_heads_together_is_refused(tiny: Any) -> None:
    model = tiny()
    layers(model)[0].self_attn.q_norm = nn.LayerNorm(32, bias=False)
    with pytest.raises(ValueError, match=r"self_attn.q_norm.weight \(32,\) is not for each head alike"):
        groups(layers(model)[0], LLAMA, heads(model))


def test_maps_that_do_not_fit_the_configuration_are_refused(tiny: Any) -> None:
    model = tiny()
    layers(model)[0].self_attn.k_proj = nn.Linear(32, 24, bias=False)
    with pytest.raises(ValueError, match=r"k_proj: 2 KV groups of the attention need .* \(16, 32\), .* has \(24, 32\)"):
        groups(layers(model)[0], LLAMA, heads(model))
    layers(model)[0].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match=r"mlp.up_proj: 48 channels of the MLP need .* \(48, 32\), .* has \(40, 32\)"):
        channels(layers(model)[0], LLAMA)


@torch.no_grad()
def test_a_site_builds_the_narrow_model_from_its_shapes(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model = restack(tiny(family, 3), range(3))
    for units in units_of(model, 1):
        narrow(layers(model)[1], units, torch.arange(1, units.count, 2))
    shapes = [{path: shape(layer.get_submodule(path)) for path in linears(layer)} for layer in layers(model)]
    fresh = AutoModelForCausalLM.from_config(model.config).eval()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    for place in range(3):
        fit(fresh, place, shapes[place])
        fit(empty, place, shapes[place])
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert all(parameter.is_meta for parameter in empty.parameters())
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == expected
    assert any(shapes[1][path] != shapes[0][path] for path in shapes[0])


@pytest.mark.parametrize(
    ("family", "shapes", "fault"),
    [
        ("llama", {"mlp.gate_proj": (24, 32), "mlp.down_proj": (32, 24)}, "up_proj: .*leaves 24 .* makes it .24, 32"),
        ("llama", {"mlp.down_proj": (30, 48)}, r"down_proj: .d_out, d_in. = \(30, 48\), but"),
        ("llama", {"mlp.down_proj": (32, 0)}, "does not leave a whole number, 1..48, of channels"),
        ("llama", {"mlp.down_proj": (32, 64)}, "does not leave a whole number, 1..48, of channels"),
        ("llama", {"self_attn.o_proj": (32, 8)}, "a whole number, 1..2, of KV groups .* 16 columns each"),
        ("llama", {"self_attn.o_proj": (32, 16), "self_attn.k_proj": (8, 32)}, "q_proj: .* makes it .16, 32"),
        ("gpt2", {"attn.c_attn": (48, 32)}, r"c_attn: .* = \(48, 32\), but attn.c_proj leaves 4 KV groups"),
        ("bloom", {"self_attention.dense": (32, 16)}, "ALiBi"),
        ("llama", {"mlp.side_proj": (4, 4)}, "mlp.side_proj: asked for .* but only mlp.down_proj, .* can be narrower"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(tiny: Any, family: str, shapes: Any, fault: str) -> None:
    model = tiny(family)
    before = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=fault):
        fit(model, 1, shapes)
    assert {name: value.shape for name, value in model.state_dict().items()} == before
