"""Ranks, alphas and scales of single maps: as the settings say, and as stock peft has them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import factors
from offsite.emulator.methods.peft_format import read
from offsite.emulator.plug import load

PLACES = {0: 0, 4: 4}
MODULES = ["q_proj", "v_proj", "down_proj", "up_proj"]
RANKS = {"self_attn.q_proj": 6, "down_proj": 2, "mlp.down_proj": 3}
ALPHAS = {"up_proj": 5.0, "q_proj": 7.0}
SETTINGS = {"rank": 4, "alpha": 6.0, "modules": MODULES, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}
SCALINGS = ["alpha / rank", "alpha / sqrt(rank)"]


def trained(adapter: Adapter) -> Adapter:
    drawn = torch.Generator().manual_seed(1)
    return {key: value + 0.2 * torch.randn(value.shape, generator=drawn) for key, value in adapter.items()}


def test_the_longest_ending_decides_the_rank_of_a_map(tiny: Any) -> None:
    start = make("lora", SETTINGS).start(tiny(), {4: 4}, seed=0)
    ranks = {place.path: pair.rank for place, pair in factors(start).items()}
    assert ranks == {"self_attn.q_proj": 6, "self_attn.v_proj": 4, "mlp.up_proj": 4, "mlp.down_proj": 3}


def test_a_smaller_site_has_no_map_above_its_rank(tiny: Any) -> None:
    method = make("lora", SETTINGS | {"ranks": {"small": 2, "usual": 4}})
    whole, small, usual = (
        method.start(tiny(), {4: 4}, seed=0, tier=tier)
        for tier in ("", method.tier_at("small"), method.tier_at("usual"))
    )
    assert {pair.rank for pair in factors(small).values()} == {2}
    assert all(torch.equal(usual[key], value) for key, value in whole.items())
    assert all(torch.equal(value, whole[key][:2]) for key, value in small.items() if key.endswith(".A"))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_peft_has_the_ranks_and_scales_of_the_same_settings(scaling: str, tiny: Any) -> None:
    method = make("lora", SETTINGS | {"scaling": scaling})
    ours = method.attach(tiny(layers=1), {0: 0}, method.start(tiny(layers=1), {0: 0}, seed=0))
    patterns = {"rank_pattern": RANKS | {"down_proj": 3}, "alpha_pattern": ALPHAS}  # peft takes the first that fits
    rooted = scaling != SCALINGS[0]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, use_rslora=rooted, **patterns)
    theirs = get_peft_model(tiny(layers=1), config)
    has, should = (
        {name: (part.r, part.scaling) for name, part in model.named_modules() if isinstance(part, LoraLayer)}
        for model in (ours, theirs)
    )
    assert len(has) == 4 and len({scale["default"] for _, scale in has.values()}) > 2
    assert has.keys() == should.keys()
    for name, (ranks, scales) in has.items():
        assert ranks == should[name][0] and scales == pytest.approx(should[name][1], rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
@torch.no_grad()
def test_attached_merged_and_exported_adapters_are_the_same_model(
    scaling: str, tiny: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    method = make("lora", SETTINGS | {"scaling": scaling})
    adapter = trained(method.start(tiny(), PLACES, seed=0))
    merged, attached = tiny(), method.attach(tiny(), PLACES, adapter)(ids).logits
    method.merge(merged, adapter)
    method.export(tmp_path, adapter, base=tiny(), base_name="owner/base")
    close = {"rtol": 1e-5, "atol": 1e-5}
    for model in (merged, load(tiny(), tmp_path), PeftModel.from_pretrained(tiny(), tmp_path)):
        torch.testing.assert_close(model(ids).logits, attached, **close)
    plain = make("lora", {"rank": 4, "alpha": 6.0}).attach(tiny(), PLACES, adapter)(ids).logits
    assert not torch.allclose(plain, attached, atol=1e-3)
    assert read(tmp_path)[1] == pytest.approx({place: method.scale_of(place.path) for place in factors(adapter)})


@torch.no_grad()
def test_an_average_of_more_ranks_keeps_each_maps_scale(tiny: Any) -> None:
    method = make("lora", SETTINGS | {"scaling": "alpha / sqrt(rank)"})
    one = trained(method.start(tiny(), {4: 4}, seed=0))
    both = {key: torch.cat([value, value], dim=int(key.endswith(".B"))) for key, value in one.items()}
    once, twice = tiny(), tiny()
    method.merge(once, one)
    method.merge(twice, both)
    for place in factors(one):
        before, single, double = (
            layers(model)[place.layer].get_submodule(place.path).get_parameter("weight")
            for model in (tiny(), once, twice)
        )
        torch.testing.assert_close(double - before, 2 * (single - before), rtol=1e-4, atol=1e-5)


def test_a_pattern_of_no_map_is_refused_before_anything_is_built(tiny: Any) -> None:
    for setting, value in (("rank_pattern", 4), ("alpha_pattern", 4.0)):
        method = make("lora", {"modules": ["q_proj", "up_proj"], setting: {"proj": value}})
        fault = f"{setting}: no map that trains ends in 'proj'; there are self_attn.q_proj, mlp.up_proj"
        with pytest.raises(ValueError, match=re.escape(fault)):
            method.fits(tiny(), {0: 0})


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: maps 'q_proj' must have more than 0, got 0"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "alpha_pattern: maps 'q_proj' must have more than 0, got 0.0"),
        ({"scaling": "alpha"}, "scaling: Input should be 'alpha / rank' or 'alpha / sqrt(rank)'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        make("lora", settings)
