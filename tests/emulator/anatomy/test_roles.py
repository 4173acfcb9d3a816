import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.emulator.anatomy.roles import TABLE, Heads, heads, roles
from offsite.emulator.anatomy.structure import find, layers, linears

LLAMA = TABLE["Llama, Qwen, Mistral, Gemma"]
DESCRIPTION = {
    "layers": "model.layers",
    "query": "self_attn.to_q",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_in": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp_out": "mlp.down_proj",
}


def renamed(model: Any) -> Any:
    """A Llama that calls its query map by another name."""
    for layer in layers(model):
        layer.self_attn.to_q = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    return model


def test_every_linear_map_of_every_family_has_a_role(family: str, tiny: Any) -> None:
    model = tiny(family)
    for place, layer in enumerate(layers(model)):
        found = roles(model, place)
        assert found.attention | found.mlp == {*linears(layer)}
        assert not found.attention & found.mlp


def test_heads_are_those_of_the_configuration(family: str, tiny: Any) -> None:
    grouped = family not in ("gpt2", "opt", "bloom", "gpt_neox")
    assert heads(tiny(family)) == Heads(count=4, groups=2 if grouped else 4, width=8)


def test_an_unknown_family_is_told_how_to_describe_itself(tiny: Any) -> None:
    model = renamed(tiny())
    with pytest.raises(ValueError) as refusal:
        roles(model, 2)
    said = str(refusal.value)
    assert said.startswith("LlamaForCausalLM, layer 2: looked for the linear maps of attention and MLP (")
    assert "GPT-2: attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj" in said
    assert "but the layer has " in said and "self_attn.to_q" in said
    example = json.loads(said[said.index('{"anatomy"') : said.index("}}") + 2])
    model.config.anatomy = example["anatomy"] | {"query": "self_attn.to_q"}
    assert roles(model, 2).query == "self_attn.to_q"  # the example is a description


def test_a_description_in_the_configuration_goes_before_the_table(tiny: Any) -> None:
    model = tiny()
    model.config.anatomy = {"layers": "model.layers"}
    assert roles(model, 0) == LLAMA
    model.config.anatomy = DESCRIPTION
    with pytest.raises(ValueError, match=r"looked for .*config.json: .*self_attn.to_q"):
        roles(model, 0)
    assert roles(renamed(model), 0).query == "self_attn.to_q"


@pytest.mark.parametrize(
    ("description", "fault"),
    [
        ({"quary": "self_attn.to_q"}, "'config.json' has no setting 'quary' .did you mean query"),
        ({"query": "self_attn.to_q"}, "'config.json': key: "),
        ({**DESCRIPTION, "fused": "rows"}, "'config.json': fused: "),
        ("model.layers", "must be a table"),
    ],
)
def test_a_description_with_a_fault_is_refused(tiny: Any, description: Any, fault: str) -> None:
    model = tiny()
    model.config.anatomy = description
    with pytest.raises(ValueError, match=fault):
        roles(model, 0)


def test_a_description_travels_with_the_configuration(tiny: Any, tmp_path: Path) -> None:
    model = tiny()
    model.config.anatomy = DESCRIPTION
    model.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert again.config.anatomy == DESCRIPTION
    assert find(again).path == "model.layers"


def test_a_described_list_of_layers_may_have_several_classes(tiny: Any) -> None:
    model = tiny("llama", 3)
    layers(model)[1] = nn.Identity()
    with pytest.raises(ValueError, match=r'"anatomy": \{"layers": "model.layers"\}'):
        find(model)
    model.config.anatomy = {"layers": "model.layers"}
    assert find(model).path == "model.layers"
    model.config.anatomy = {"layers": "decoder.layers"}
    with pytest.raises(ValueError, match=r"3 blocks at the path 'decoder.layers' .* and found 0"):
        find(model)


def test_a_described_list_is_found_inside_a_wrapper(tiny: Any) -> None:
    model = tiny("llama", 3)
    model.second = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.config.anatomy = {"layers": "model.layers"}
    wrapper = nn.Module()
    wrapper.config, wrapper.inner = model.config, model
    assert find(wrapper).path == "inner.model.layers"
