"""DoRA: what its formula says, what stock peft makes of it, and by which rules it is averaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.runs.pairs import is_exact
from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.dora import Decomposed
from offsite.emulator.plug import load

PLACES = {0: 0, 4: 4}
METHOD = make("dora", {"rank": 3, "alpha": 6.0})


def moved(adapter: Adapter, seed: int = 1) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    return {key: value + 0.1 * torch.randn(value.shape, generator=drawn) for key, value in adapter.items()}


@torch.no_grad()
def test_rows_have_the_direction_of_the_sum_and_the_length_that_the_magnitude_says(tiny: Any) -> None:
    adapter, model = moved(METHOD.start(tiny(), {4: 4}, seed=0)), tiny()
    W = layers(tiny())[4].mlp.up_proj.weight
    METHOD.merge(model, adapter)
    merged = layers(model)[4].mlp.up_proj.weight
    turned = W + 2.0 * adapter["4.mlp.up_proj.B"] @ adapter["4.mlp.up_proj.A"]
    torch.testing.assert_close(torch.cosine_similarity(merged, turned), torch.ones(len(W)))
    torch.testing.assert_close(merged.norm(dim=1), (1 + adapter["4.mlp.up_proj.magnitude"]) * W.norm(dim=1))


@torch.no_grad()
def test_attached_and_merged_and_in_stock_peft_it_is_the_same_model(
    family: str, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    adapter, merged = moved(METHOD.start(tiny(family), PLACES, seed=0)), tiny(family)
    attached = METHOD.attach(tiny(family), PLACES, adapter)(ids).logits
    METHOD.merge(merged, adapter)
    torch.testing.assert_close(merged(ids).logits, attached, rtol=1e-4, atol=1e-4)
    METHOD.export(tmp_path, adapter, base=tiny(family), base_name="owner/base")
    for model in (PeftModel.from_pretrained(tiny(family), tmp_path), load(tiny(family), tmp_path)):
        torch.testing.assert_close(model(ids).logits, attached, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tiny(family)(ids).logits, attached, atol=1e-3)


def test_gradients_are_those_of_peft_which_takes_none_of_the_norm(tiny: Any, text: Any, tmp_path: Path) -> None:
    adapter, path = moved(METHOD.start(tiny(), {4: 4}, seed=0)), "mlp.up_proj"
    ours = METHOD.attach(tiny(), {4: 4}, adapter)
    METHOD.export(tmp_path, adapter, base=tiny(), base_name="owner/base")
    theirs = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        modality.loss(model, text[0]).backward()
    live, wrapped = METHOD.named_parameters(ours, {4: 4}), layers(theirs)[4].get_submodule(path)
    length = layers(tiny())[4].mlp.up_proj.weight.norm(dim=1)
    for part, peft in (("A", wrapped.lora_A), ("B", wrapped.lora_B), ("magnitude", wrapped.lora_magnitude_vector)):
        scale = length if part == "magnitude" else 1.0  # ours is a share of the length
        torch.testing.assert_close(live[f"4.{path}.{part}"].grad, scale * peft["default"].weight.grad)


@torch.no_grad()
def test_a_layer_of_an_emulator_is_found_for_an_export_of_several_ranks(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    start = METHOD.start(tiny(), {4: 4}, seed=0)
    wide = moved(make("dora", {"rank": 5}).start(tiny(), {4: 4}, seed=0))
    mixed = {key: wide[key] if "up_proj" in key else value for key, value in moved(start).items()}
    METHOD.export(tmp_path, mixed, base=tiny(), base_name="owner/base")
    expected = METHOD.attach(tiny(), {4: 4}, mixed)(ids).logits
    torch.testing.assert_close(load(tiny(), tmp_path)(ids).logits, expected, rtol=1e-5, atol=1e-5)
    short = tiny()
    layers(short)[0].load_state_dict(layers(tiny())[4].state_dict())
    placed = load(short, tmp_path, {0: 4})
    assert {name.split("layers.")[1][:2] for name, _ in placed.named_modules() if name.endswith("lora_A")} == {"0."}


@torch.no_grad()
def test_a_row_of_zeros_stays_one_and_no_value_is_lost(tiny: Any) -> None:
    linear = nn.Linear(6, 4)
    linear.weight[1] = 0
    parts = {"A": torch.randn(2, 6), "B": torch.randn(4, 2), "magnitude": torch.randn(4)}
    for B in (parts["B"], torch.zeros(4, 2)):
        module, x = Decomposed(linear, parts | {"B": B}, scale=2.0), torch.randn(3, 6)
        W, b = METHOD.merged(linear.weight, linear.bias, parts | {"B": B})
        assert bool(W.isfinite().all()) and not W[1].any()
        torch.testing.assert_close(module(x), x @ W.T + b, rtol=1e-4, atol=1e-5)


def test_products_and_magnitudes_are_averaged_each_by_its_rule_and_the_mean_is_called_near(tiny: Any) -> None:
    start = METHOD.start(tiny(), {4: 4}, seed=0)
    strategy = aggregation.make("low-rank", {})
    fold = strategy.begin(Version(start, {"": start}), METHOD.schema(start))
    updates = {0.75: moved(start, seed=1), 0.25: moved(start, seed=2)}
    for weight, update in updates.items():
        fold.add(update, Origin(f"{weight}", "", weight))
    version, name = fold.finish([""]), "4.mlp.up_proj"
    product = sum(weight * one[f"{name}.B"] @ one[f"{name}.A"] for weight, one in updates.items())
    torch.testing.assert_close(version.adapter[f"{name}.B"] @ version.adapter[f"{name}.A"], product)
    magnitude = sum(weight * one[f"{name}.magnitude"] for weight, one in updates.items())
    torch.testing.assert_close(version.adapter[f"{name}.magnitude"], magnitude)
    assert not is_exact(METHOD, strategy) and is_exact(make("lora", {}), strategy)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="method 'dora': rank must be at least 1"):
        make("dora", {"rank": 0})
    assert make("dora", {"rank": 4, "alpha": 6.0, "scaling": "alpha / sqrt(rank)"}).scale == 3.0


def test_a_narrowed_map_is_refused_for_its_rows_would_turn_less_in_the_base(tiny: Any) -> None:
    start = METHOD.start(tiny(), {4: 4}, seed=0)
    assert METHOD.recover(start, {"3.mlp.up_proj.shape": torch.tensor([48, 32])}) == start
    with pytest.raises(ValueError, match=r"4.mlp.up_proj: the emulator's map is narrower .* another method"):
        METHOD.recover(start, {"4.mlp.up_proj.shape": torch.tensor([48, 32])})
