import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from offsite.emulator.anatomy.structure import find, layers, linears
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import factors
from offsite.emulator.methods.peft_format import read

PLACES = {0: 0, 4: 4}
METHOD = make("lora", {"rank": 4, "alpha": 6})
SCALE = 1.5


def adapter_for(model: Any, *, mixed: bool = False) -> Adapter:
    """A trained adapter, with ranks that differ from layer to layer if asked for."""
    start = METHOD.start(model, {0: 0}, seed=0) | METHOD.start(model, {4: 4}, seed=0, tier="r2" if mixed else "")
    torch.manual_seed(1)
    return {key: value + 0.2 * torch.randn_like(value) for key, value in start.items()}


@torch.no_grad()
def test_merged_weights_give_what_the_attached_adapter_gives(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model = tiny(family)
    adapter = adapter_for(model)
    before = model(ids).logits
    attached = METHOD.attach(tiny(family), PLACES, adapter)(ids).logits
    METHOD.merge(model, adapter)
    torch.testing.assert_close(model(ids).logits, attached, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, attached, atol=1e-2)


def test_merging_changes_the_layers_of_the_adapter_and_no_other(family: str, tiny: Any) -> None:
    model, untouched = tiny(family), tiny(family)
    METHOD.merge(model, adapter_for(model))
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, untouched.state_dict()[name])
    }
    for number, layer in enumerate(layers(model)):
        for path in linears(layer):
            name = f"{find(model).path}.{number}.{path}.weight"
            assert (name in changed) == (number in PLACES)
            changed.discard(name)
    assert not changed


def test_merging_is_computed_in_fp32(tiny: Any) -> None:
    model = tiny().to(torch.bfloat16)
    weight = layers(model)[0].self_attn.q_proj.weight
    adapter = adapter_for(model)
    change = SCALE * (adapter["0.self_attn.q_proj.B"] @ adapter["0.self_attn.q_proj.A"])
    expected = (weight.float() + change).to(torch.bfloat16)
    METHOD.merge(model, adapter)
    assert torch.equal(weight, expected)


def test_an_adapter_that_does_not_fit_changes_nothing(tiny: Any) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = adapter_for(model)
    beyond = adapter | {"9" + key[1:]: value for key, value in adapter.items() if key.startswith("4.")}
    with pytest.raises(ValueError, match="the adapter is for layer 9, the model has 6 layers"):
        METHOD.merge(model, beyond)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_peft_loads_the_export_on_the_base(
    family: str, tiny: Any, ids: torch.Tensor, tmp_path: Path, mixed: bool
) -> None:
    model = tiny(family)
    adapter = adapter_for(model, mixed=mixed)
    METHOD.export(tmp_path, adapter, base=model, base_name="owner/base")
    attached = METHOD.attach(tiny(family), PLACES, adapter)(ids).logits
    loaded = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(loaded(ids).logits, attached)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["fan_in_fan_out"] == (family == "gpt2")
    again, scales = read(tmp_path)
    assert {*scales} == {*factors(adapter)} and {*scales.values()} == {SCALE}
    assert again.keys() == adapter.keys() and all(torch.equal(again[key], adapter[key]) for key in adapter)
