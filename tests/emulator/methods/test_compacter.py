"""Compacter: what its products are, and that what all maps have in common is one tensor everywhere."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import Formula
from offsite.emulator.methods.compacter import Compact, kronecker

PLACES = {0: 0, 4: 4}
METHOD = make("compacter", {"width": 6, "terms": 2})
SLOW = "0.mlp.down_proj.slow"


def moved(adapter: Adapter, seed: int = 1) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    return {key: value + 0.1 * torch.randn(value.shape, generator=drawn) for key, value in adapter.items()}


def explicit(adapter: Adapter, name: str, way: str) -> Tensor:
    both = zip(adapter[f"{name}.{way}_s"], adapter[f"{name}.{way}_t"], strict=True)
    terms = [torch.kron(A, torch.outer(s, t)) for A, (s, t) in zip(adapter[SLOW], both, strict=True)]
    return torch.stack(terms).sum(0)


@torch.no_grad()
def test_a_map_is_followed_by_a_bottleneck_of_sums_of_kronecker_products(tiny: Any) -> None:
    adapter, x = moved(METHOD.start(tiny(), PLACES, seed=0)), torch.randn(2, 5, 48)
    y, name = layers(tiny())[4].mlp.down_proj(x), "4.mlp.down_proj"
    D, U = explicit(adapter, name, "down"), explicit(adapter, name, "up")
    assert D.shape == (6, 32) and U.shape == (32, 6)
    torch.testing.assert_close(kronecker(adapter[SLOW], adapter[f"{name}.up_s"], adapter[f"{name}.up_t"]), U)
    model = METHOD.attach(tiny(), PLACES, adapter)
    expected = y + functional.gelu(y @ D.T + adapter[f"{name}.down_bias"]) @ U.T + adapter[f"{name}.up_bias"]
    torch.testing.assert_close(layers(model)[4].mlp.down_proj(x), expected)


def test_what_all_maps_have_in_common_is_counted_once(tiny: Any) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    assert [key for key in start if key.endswith(".slow")] == [SLOW]
    assert sum(tensor.numel() for tensor in start.values()) == 4 * 3 * (6 + 32) + 2**3
    formula, sizes = Formula(*METHOD.formula), {"width": 16, "terms": 4, "d_out": 576}
    count = 60 * eval(formula.values, {}, sizes) + eval(formula.once, {}, sizes)
    assert count == 106_624  # two maps in each of 30 layers, by the paper's own count


def test_its_gradient_is_the_sum_of_those_of_all_maps(tiny: Any, text: Any) -> None:
    adapter = moved(METHOD.start(tiny(), PLACES, seed=0))
    model, apart = (METHOD.attach(tiny(), PLACES, adapter) for _ in range(2))
    one = METHOD.named_parameters(model, PLACES)[SLOW]
    ours = [module for module in model.modules() if isinstance(module, Compact)]
    theirs = [module for module in apart.modules() if isinstance(module, Compact)]
    assert len(ours) == 4 and all(module.get_parameter("slow") is one for module in ours)
    for module in theirs:
        module.slow = nn.Parameter(adapter[SLOW].clone())
    for each in (model, apart):
        modality.loss(each, text[0]).backward()
    gradients = [module.get_parameter("slow").grad for module in theirs]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    torch.testing.assert_close(one.grad, torch.stack(gradients).sum(0))


def test_the_mean_of_two_sites_is_the_mean_of_each_tensor(tiny: Any) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    updates = {0.75: moved(start, seed=1), 0.25: moved(start, seed=2)}
    fold = aggregation.make("mean", {}).begin(Version(start, {"": start}), METHOD.schema(start))
    for weight, update in updates.items():
        fold.add(update, Origin(f"{weight}", "", weight))
    mean = fold.finish([""]).adapter
    assert mean.keys() == start.keys()
    for key, tensor in mean.items():
        torch.testing.assert_close(tensor, sum(weight * update[key] for weight, update in updates.items()))


def test_what_cannot_be_trained_is_refused(tiny: Any) -> None:
    for settings in ({"width": 6}, {"terms": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="width must be a multiple of terms, both at least 1"):
            make("compacter", settings)
    with pytest.raises(ValueError, match=r"0\.self_attn\.o_proj has 32 rows, which 5 terms do not divide"):
        make("compacter", {"width": 5, "terms": 5}).fits(tiny(), PLACES)
    recovery = {"4.mlp.down_proj.shape": torch.tensor([32, 48])}
    with pytest.raises(ValueError, match=r"4\.mlp\.down_proj: the emulator's map is narrower .* another method"):
        METHOD.recover(METHOD.start(tiny(), PLACES, seed=0), recovery)


def test_an_adapter_that_is_none_is_refused_with_what_is_wrong(tiny: Any) -> None:
    start, model = METHOD.start(tiny(), PLACES, seed=0), tiny()
    elsewhere = {key: tensor for key, tensor in start.items() if key != SLOW} | {"4.mlp.down_proj.slow": start[SLOW]}
    with pytest.raises(
        ValueError, match=r"what all maps have in common, slow, lies at the first of them, 0\.mlp\.down"
    ):
        METHOD.attach(model, PLACES, elsewhere)
    wide = {key: torch.zeros(2, 17) for key in start if key.endswith(("down_t", "up_s"))}
    with pytest.raises(ValueError, match=r": 2 terms of 3 and 17 do not make a bottleneck of 6 behind 32 rows"):
        METHOD.attach(model, PLACES, start | wide)
    with pytest.raises(ValueError, match=r"does not fit a linear map of \(d_out, d_in\) = \(32, 32\)"):
        METHOD.attach(model, PLACES, start | {SLOW: torch.zeros(3, 3, 3)})
    METHOD.attach(model, PLACES, start)  # which none of these has changed
