import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from offsite.emulator import modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, linears, shape
from offsite.emulator.methods import METHODS, Adapter, make
from offsite.emulator.methods.base import factors

ENDS = {0: 0, 2: 5}  # position in an emulator of layers 0, 3, 5 -> absolute id


def trained(adapter: Adapter, *, seed: int = 1) -> Adapter:
    """An adapter whose B is no longer zero."""
    torch.manual_seed(seed)
    return {key: value + 0.1 * torch.randn_like(value) for key, value in adapter.items()}


@torch.no_grad()
def test_an_adapter_changes_nothing_at_its_start(family: str, tiny: Any, ids: torch.Tensor) -> None:
    model, method = tiny(family), make("lora", {})
    before = model(ids).logits
    attached = method.attach(model, {0: 0, 5: 5}, method.start(model, {0: 0, 5: 5}, seed=0))
    assert torch.equal(attached(ids).logits, before)


def test_what_is_attached_is_read_back_exactly(family: str, tiny: Any) -> None:
    emulator, method = restack(tiny(family), [0, 3, 5]), make("lora", {"rank": 3})
    adapter = trained(method.start(emulator, ENDS, seed=0))
    attached = method.attach(emulator, ENDS, adapter)
    state = method.state(attached, ENDS)
    assert state.keys() == adapter.keys()
    live = method.named_parameters(attached, ENDS)
    for key, value in state.items():
        assert torch.equal(value, adapter[key])
        assert value.data_ptr() != live[key].data_ptr()


def test_only_the_adapter_trains_and_all_of_it_has_a_gradient(family: str, tiny: Any, text: Any) -> None:
    emulator, method = restack(tiny(family), [0, 3, 5]), make("lora", {})
    attached = method.attach(emulator, ENDS, trained(method.start(emulator, ENDS, seed=0)))
    live = method.named_parameters(attached, ENDS)
    training = [parameter for parameter in attached.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in training} == {id(parameter) for parameter in live.values()}
    modality.loss(attached, text[0]).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in live.values())


def test_keys_and_shapes_are_those_of_the_base(family: str, tiny: Any) -> None:
    model, method = tiny(family), make("lora", {"rank": 4})
    adapter = method.start(restack(model, [0, 3, 5]), ENDS, seed=0)
    expected = {}
    for layer in (0, 5):
        for path in linears(layers(model)[layer]):
            d_out, d_in = shape(layers(model)[layer].get_submodule(path))
            expected |= {f"{layer}.{path}.A": (4, d_in), f"{layer}.{path}.B": (d_out, 4)}
    assert {key: tuple(value.shape) for key, value in adapter.items()} == expected
    assert all(value.dtype == torch.float32 for value in adapter.values())


def test_base_and_emulator_start_from_the_same_adapter_whichever_layers_train(tiny: Any) -> None:
    model, method = tiny(), make("lora", {})
    base = method.start(model, {0: 0, 1: 1, 5: 5}, seed=3)
    emulator = method.start(restack(model, [0, 3, 5]), ENDS, seed=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    again = method.start(model, {5: 5}, seed=3)
    torch.set_num_threads(threads)
    assert all(torch.equal(value, base[key]) for key, value in (emulator | again).items())
    assert not torch.equal(base["0.self_attn.q_proj.A"], base["1.self_attn.q_proj.A"])
    assert not torch.equal(base["0.self_attn.q_proj.A"], base["0.self_attn.k_proj.A"])
    assert not torch.equal(method.start(model, {0: 0}, seed=4)["0.self_attn.q_proj.A"], base["0.self_attn.q_proj.A"])


def test_a_start_draws_as_peft_does(tiny: Any) -> None:
    adapter = make("lora", {"rank": 64}).start(tiny(), {0: 0}, seed=0)
    for key, value in adapter.items():
        if key.endswith(".B"):
            assert not value.any()
            continue
        reference = nn.init.kaiming_uniform_(torch.empty_like(value), a=math.sqrt(5))
        bound = value.shape[1] ** -0.5
        assert value.abs().max() <= bound and value.abs().max() > 0.95 * bound
        assert value.std() == pytest.approx(float(reference.std()), rel=0.1)


def test_a_lower_rank_starts_from_the_first_rows(tiny: Any) -> None:
    model, method = tiny(), make("lora", {"rank": 8})
    whole, low = (method.start(model, {0: 0}, seed=0, tier=tier) for tier in ("", "r3"))
    assert all(torch.equal(value, whole[key][:3]) for key, value in low.items() if key.endswith(".A"))
    assert all(value.shape[1] == 3 for key, value in low.items() if key.endswith(".B"))


@torch.no_grad()
def test_the_scale_is_the_same_at_every_rank(family: str, tiny: Any, ids: torch.Tensor) -> None:
    method = make("lora", {"rank": 8, "alpha": 24})
    assert method.scale_of("mlp.up_proj") == 3.0
    low = trained(method.start(tiny(family), {5: 5}, seed=0, tier="r2"))
    padded = {
        key: torch.cat([value, torch.zeros(6, value.shape[1])])
        if key.endswith("A")
        else torch.cat([value, torch.zeros(value.shape[0], 6)], dim=1)
        for key, value in low.items()
    }
    mixed = padded | {key: value for key, value in low.items() if linears(layers(tiny(family))[5])[0] in key}
    logits = [method.attach(tiny(family), {5: 5}, adapter)(ids).logits for adapter in (low, padded, mixed)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[0], tiny(family)(ids).logits, atol=1e-3)


def test_modules_are_chosen_by_the_endings_of_their_paths(tiny: Any) -> None:
    adapter = make("lora", {"modules": ["q_proj", "mlp.up_proj"]}).start(tiny(), {0: 0}, seed=0)
    assert {place.path for place in factors(adapter)} == {"self_attn.q_proj", "mlp.up_proj"}
    with pytest.raises(ValueError, match=r"no linear map of a layer ends in 'proj'; there are self_attn.q_proj,"):
        make("lora", {"modules": ["proj"]}).start(tiny(), {0: 0}, seed=0)


def test_the_adapter_trains_in_fp32_on_a_bf16_model(tiny: Any, ids: torch.Tensor) -> None:
    model, method = tiny().to(torch.bfloat16), make("lora", {})
    adapter = trained(method.start(model, {0: 0}, seed=0))
    attached = method.attach(model, {0: 0}, adapter)
    assert all(torch.equal(value, adapter[key]) for key, value in method.state(attached, {0: 0}).items())
    for parameter in attached.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert attached(ids).logits.dtype == torch.bfloat16


def test_frozen_tensors_stay_as_they_are_through_training(family: str, tiny: Any, text: Any) -> None:
    emulator, method = restack(tiny(family), [0, 3, 5]), make("lora", {})
    attached = method.attach(emulator, ENDS, method.start(emulator, ENDS, seed=0))
    live = method.named_parameters(attached, ENDS)
    frozen = {name: p.clone() for name, p in attached.named_parameters() if not p.requires_grad}
    before = method.state(attached, ENDS)
    optimiser = torch.optim.AdamW(live.values(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        modality.loss(attached, text[0]).backward()
        optimiser.step()
    assert all(torch.equal(p, frozen[name]) for name, p in attached.named_parameters() if not p.requires_grad)
    after = method.state(attached, ENDS)
    assert not any(torch.equal(after[key], before[key]) for key in before)


def test_an_adapter_that_does_not_fit_is_refused(tiny: Any) -> None:
    model, method = tiny(), make("lora", {})
    adapter = method.start(model, {0: 0, 5: 5}, seed=0)
    with pytest.raises(ValueError, match=r"the adapter is for layers \[0, 5\], but those that train are \[0, 4\]"):
        method.attach(model, {0: 0, 4: 4}, adapter)
    narrow = {key: value[:, :5] if key.endswith("A") else value for key, value in adapter.items()}
    with pytest.raises(ValueError, match=r"A \(8, 5\) and B \(32, 8\) do not fit .* \(d_out, d_in\) = \(32, 32\)"):
        method.attach(model, {0: 0, 5: 5}, narrow)
    with pytest.raises(ValueError, match=r"no linear map 'attn.c_attn'; there are self_attn.q_proj"):
        method.attach(model, {0: 0}, method.start(tiny("gpt2"), {0: 0}, seed=0))


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({}, "the adapter is empty"),
        ({"0.mlp.A": (2, 3)}, "has '0.mlp.A' but not '0.mlp.B'"),
        ({"0.mlp.B": (2, 3)}, "has '0.mlp.B' but not '0.mlp.A'"),
        ({"0.mlp.A": (2, 3), "0.mlp.B": (4, 3)}, "do not multiply"),
        ({"x.mlp.A": (2, 3)}, "expected '<layer>.<path inside the layer>.A'"),
        ({"0.A": (2, 3)}, "expected '<layer>.<path inside the layer>.A'"),
        ({"0.mlp.C": (2, 3)}, "expected '<layer>.<path inside the layer>.A'"),
    ],
)
def test_what_is_no_adapter_is_refused(keys: dict[str, tuple[int, int]], fault: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        factors({key: torch.zeros(shape) for key, shape in keys.items()})


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method 'lora': rank must be at least 1"):
        make("lora", {"rank": 0})
    with pytest.raises(ValueError, match=r"method 'lora': ranks: site 'small' must have a rank in 1..4, got 8"):
        make("lora", {"rank": 4, "ranks": {"small": 8}})
    with pytest.raises(ValueError, match=r"no method 'laro'; known are amt, .*, lora, "):
        make("laro", {})
    assert all(METHODS[name].name == name for name in METHODS)
