"""What peft's types owe beyond the conformance suite: equal starts, files that peft loads, and odd bases."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, PromptTuningConfig

from offsite.emulator import builders, modality, refusals
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.builders import Material
from offsite.emulator.methods import METHODS, Adapter, make
from offsite.emulator.methods.peft_hub import PeftMethod
from offsite.emulator.placements import Ends
from offsite.emulator.plug import load

TYPES = sorted(name for name in METHODS if issubclass(METHODS[name], PeftMethod))
SAMPLE = {"miss", "oft", "vera"}  # linear, not linear, and with matrices that no adapter has
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in SAMPLE)) for name in TYPES]
ENDS = {0: 0, 2: 3}  # position in an emulator of layers 0, 1, 3 -> absolute id
BASE = {0: 0, 3: 3}


def moved(adapter: Adapter) -> Adapter:
    """An adapter of which every value has changed."""
    draw = torch.Generator().manual_seed(1)
    return {key: value + 0.05 * torch.randn(value.shape, generator=draw) for key, value in adapter.items()}


def test_every_type_of_peft_is_a_method_or_is_refused_with_a_reason() -> None:
    types = {member.value.lower() for member in PeftType}
    assert {*TYPES, "lora"} | refusals.PEFT.keys() == types
    assert not METHODS.keys() & refusals.PEFT.keys()
    for name, reason in refusals.PEFT.items():
        with pytest.raises(ValueError, match=f"there is no method '{name}': ") as raised:
            make(name, {})
        assert str(raised.value).endswith(reason)


@pytest.mark.parametrize("name", CASES)
def test_base_and_emulator_start_from_the_same_adapter_whatever_the_weights_and_whichever_layers_train(
    name: str, tiny: Any
) -> None:
    model, method = tiny(layers=4), make(name, {})
    base = method.start(model, {0: 0, 1: 1, 3: 3}, seed=3)
    emulator = method.start(restack(model, [0, 1, 3]), ENDS, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    drawn = torch.random.get_rng_state()
    other = method.start(model, {3: 3}, seed=3)
    assert torch.equal(torch.random.get_rng_state(), drawn), "whoever draws next is not disturbed"
    assert all(torch.equal(value, base[key]) for key, value in (emulator | other).items())


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_is_exported_and_computes_the_same(
    name: str, tiny: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    base, method = tiny(layers=4), make(name, {})
    adapter = moved(method.start(base, BASE, seed=0))
    method.export(tmp_path, adapter, base=base, base_name="base")
    before = base(ids).logits
    method.merge(base, adapter)
    merged = base(ids).logits
    assert (merged - before).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(tiny(layers=4), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, merged, rtol=1e-4, atol=1e-4)
    emulator = restack(tiny(layers=4), [0, 1, 3])
    ours = load(emulator, tmp_path, ENDS)(ids).logits
    torch.testing.assert_close(ours, method.attach(restack(tiny(layers=4), [0, 1, 3]), ENDS, adapter)(ids).logits)


@pytest.mark.parametrize("name", CASES)
def test_an_export_tells_nothing_of_the_weights_of_the_base(name: str, tiny: Any, tmp_path: Path) -> None:
    method, files = make(name, {}), []
    for other in (False, True):
        base = tiny(layers=2)
        adapter = moved(method.start(base, {1: 1}, seed=0))
        for parameter in base.parameters():
            parameter.data += other * torch.randn_like(parameter)
        method.export(tmp_path, adapter, base=base, base_name="base")
        files.append((tmp_path / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("name", CASES)
def test_all_of_it_trains_in_fp32_beside_maps_of_few_bits(name: str, tiny: Any, text: Any) -> None:
    chain = [builders.make("whole", {}), builders.make("quantised", {"format": "nf4"})]
    draft = builders.run(chain, Ends(1, 1), tiny(layers=3).bfloat16(), Material(batches=text))
    method, places = make(name, {}), draft.outline.places
    attached = method.attach(draft.model, places, moved(method.start(draft.model, places, seed=0))).train()
    modality.loss(attached, text[0]).backward()
    live = method.named_parameters(attached, places).values()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in live)  # type: ignore[union-attr]
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in live)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CASES)
def test_a_merged_base_of_bf16_is_the_rounded_one_of_fp32(name: str, tiny: Any) -> None:
    method, base = make(name, {}), tiny(layers=2).bfloat16()
    exact = tiny(layers=2).bfloat16().float()
    adapter = moved(method.start(base, {1: 1}, seed=0))
    for model in (base, exact):
        method.merge(model, adapter)
    rounded = exact.bfloat16().state_dict()
    assert all(torch.equal(value, rounded[key]) for key, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters()), "nobody froze the base"


@pytest.mark.parametrize("name", CASES)
def test_maps_that_are_stored_the_other_way_round_train_or_are_refused_in_a_sentence(name: str, tiny: Any) -> None:
    model, method = tiny("gpt2", layers=2), make(name, {})
    try:
        method.fits(model, {0: 0})
    except ValueError as error:
        assert str(error).startswith(f"peft has no {name} for 0.attn.c_attn (96, 32): ")
    else:
        method.attach(model, {0: 0}, method.start(model, {0: 0}, seed=0))


def test_a_size_that_does_not_divide_a_map_is_refused_with_the_map(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"peft has no c3a for 0.self_attn.q_proj \(32, 32\): The block size should"):
        make("c3a", {"block_size": 20}).fits(tiny(layers=2), {0: 0})


def test_what_was_narrowed_is_refused(tiny: Any) -> None:
    method = make("ia3", {})
    with pytest.raises(ValueError, match=r"^0.mlp.up_proj.ia3_l: the emulator's map is narrower than the base's"):
        method.recover(method.start(tiny(layers=2), {0: 0}, seed=0), {"0.mlp.up_proj.shape": torch.tensor([48, 32])})


@pytest.mark.parametrize("name", CASES)
def test_a_size_that_is_none_is_refused_before_peft_sees_it(name: str) -> None:
    sizes = [field.name for field in fields(METHODS[name]) if field.type in (int, float) and field.default]  # type: ignore[arg-type]
    for size in sizes:
        with pytest.raises(ValueError, match=f"method '{name}': {size} must be positive, got -1"):
            make(name, {size: -1})
    assert sizes or name == "ia3"


def test_a_folder_of_a_type_that_is_no_method_is_refused_with_the_reason(tiny: Any, tmp_path: Path) -> None:
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no method 'prompt_tuning': it trains tokens put before the prompt"):
        load(tiny(layers=2), tmp_path)
