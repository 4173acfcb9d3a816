"""Methods whose tensors train beside linear maps: what they count, and that they are what their formulas say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offsite.coordinator.aggregation import make as strategy
from offsite.coordinator.aggregation.base import Origin, Version
from offsite.emulator.anatomy.narrow import channels, groups, narrow
from offsite.emulator.anatomy.roles import heads, roles
from offsite.emulator.anatomy.structure import layers, shape
from offsite.emulator.methods import Adapter, Method, make
from offsite.emulator.plug import load

PLACES = {0: 0, 4: 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "in series": ("bottleneck", {"width": 3}),
    "in parallel": ("bottleneck", {"width": 3, "form": "parallel", "activation": "gelu"}),
    "scaled": ("ssf", {}),
    "branches": ("hydra", {"rank": 2, "modules": "all-linear", "scale": 0.5}),
    "beside all maps": ("bottleneck", {"width": 2, "form": "parallel", "modules": "all-linear"}),
}


@pytest.fixture(params=sorted(CASES))
def method(request: pytest.FixtureRequest) -> Method:
    name, settings = CASES[request.param]
    return make(name, settings)


def moved(method: Method, model: Any, *, seed: int = 1) -> Adapter:
    """An adapter that has learned something."""
    torch.manual_seed(seed)
    return {key: t + 0.1 * torch.randn_like(t) for key, t in method.start(model, PLACES, seed=0).items()}


@torch.no_grad()
@pytest.mark.parametrize("form", ["series", "parallel"])
def test_a_bottleneck_adds_what_passes_through_it(tiny: Any, form: str) -> None:
    method = make("bottleneck", {"width": 3, "form": form, "activation": "relu"})
    adapter, x = moved(method, tiny()), torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    y = layers(tiny())[4].get_submodule("mlp.down_proj")(x)
    D, U = adapter["4.mlp.down_proj.down"], adapter["4.mlp.down_proj.up"]
    model = method.attach(tiny(), PLACES, adapter)
    expected = y + functional.relu((y if form == "series" else x) @ D.T) @ U.T
    torch.testing.assert_close(layers(model)[4].get_submodule("mlp.down_proj")(x), expected)


def test_a_start_is_zero_where_it_comes_back_up_and_nowhere_else(tiny: Any) -> None:
    # With both at zero neither would ever have a gradient.
    start = make("bottleneck", {"width": 3}).start(tiny(), PLACES, seed=0)
    assert all(bool(tensor.any()) != key.endswith(".up") for key, tensor in start.items())
    other = make("bottleneck", {"width": 3}).start(tiny(), {4: 4}, seed=0)
    assert all(torch.equal(start[key], tensor) for key, tensor in other.items()), "whichever other layers train"


@torch.no_grad()
@pytest.mark.parametrize("name", ["bottleneck", "compacter", "hydra", "ssf"])
def test_families_that_keep_maps_otherwise_train_too(
    family: str, tiny: Any, ids: Tensor, name: str, tmp_path: Path
) -> None:
    method, original, merged = make(name, {}), tiny(family)(ids).logits, tiny(family)
    adapter = moved(method, tiny(family))
    expected = method.attach(tiny(family), PLACES, adapter)(ids).logits
    assert not torch.allclose(expected, original, atol=1e-3)
    method.export(tmp_path, adapter, base=tiny(family), base_name="base")
    assert torch.equal(load(tiny(family), tmp_path)(ids).logits, expected)
    if method.mergeable:
        method.merge(merged, adapter)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_map_is_scaled_and_shifted_where_it_has_a_bias(tiny: Any, family: str) -> None:
    method, path = make("ssf", {}), {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}[family]
    adapter = moved(method, tiny(family))
    y = layers(tiny(family))[4].get_submodule(path)
    x = torch.randn(3, shape(y)[1], generator=torch.Generator().manual_seed(1))
    scale, shift = adapter[f"4.{path}.scale"], adapter.get(f"4.{path}.shift", torch.zeros(1))
    assert (f"4.{path}.shift" in adapter) == (family == "gpt2")
    attached = layers(method.attach(tiny(family), PLACES, adapter))[4].get_submodule(path)
    torch.testing.assert_close(attached(x), y(x) * (1 + scale) + shift)


def merged(method: Method, model: Any, adapter: Adapter) -> dict[str, Tensor]:
    method.merge(model, adapter)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["hydra", "ssf"])
def test_the_average_of_a_round_is_the_mean_of_the_weights(tiny: Any, name: str, family: str) -> None:
    method, shares = make(name, {}), (0.5, 0.3, 0.2)
    start = method.start(tiny(family), PLACES, seed=0)
    adapters = [moved(method, tiny(family), seed=seed) for seed in (1, 2, 3)]
    fold = strategy("low-rank", {}).begin(Version(start, {"": start}), method.schema(start))
    for site, adapter, share in zip("abc", adapters, shares, strict=True):
        fold.add(adapter, Origin(site, "", share))
    version = fold.finish([""])
    assert {key: tensor.shape for key, tensor in version.broadcast[""].items()} == {
        k: t.shape for k, t in start.items()
    }
    together = merged(method, tiny(family), version.adapter)
    apart = [merged(method, tiny(family), adapter) for adapter in adapters]
    for key, tensor in together.items():
        mean = sum(share * one[key] for share, one in zip(shares, apart, strict=True))
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_a_narrowed_layer_learned_is_the_same_in_the_full_one_with_zeros_for_what_went(
    method: Method, tiny: Any
) -> None:
    base, small = tiny(), tiny()
    recovery: dict[str, Tensor] = {}
    for place in PLACES:
        layer, maps = layers(small)[place], roles(small, place)
        units = [
            (channels(layer, maps), torch.arange(1, 48, 2)),
            (groups(layer, maps, heads(small)), torch.tensor([1])),
        ]
        for one, kept in units:
            recovery |= {f"{place}.{name}": index for name, index in narrow(layer, one, kept).items()}
    adapter = moved(method, small)
    wide = method.recover(adapter, recovery)
    method.attach(small, PLACES, adapter)
    method.attach(base, PLACES, wide)
    seen = 0
    for key in recovery:
        place, _, rest = key.partition(".")
        path, _, what = rest.rpartition(".")
        inside, outside = (layers(model)[int(place)].get_submodule(path) for model in (small, base))
        if what != "shape" or type(inside) is torch.nn.Linear:
            continue
        d_out, d_in = shape(outside.linear)
        rows = recovery.get(f"{place}.{path}.rows", torch.arange(d_out))
        columns = recovery.get(f"{place}.{path}.columns", torch.arange(d_in))
        x = torch.randn(3, len(columns), generator=torch.Generator().manual_seed(2))
        full = torch.zeros(3, d_in).index_copy(1, columns, x)
        torch.testing.assert_close(outside(full)[:, rows], inside(x))
        seen += 1
    assert seen


def test_what_cannot_be_trained_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        make("bottleneck", {"width": 0})
    with pytest.raises(ValueError, match="rank must be at least 1 and scale positive, got 4 and 0.0"):
        make("hydra", {"scale": 0.0})
    with pytest.raises(ValueError, match="no linear map of a layer ends in 'nope'; there are self_attn.q_proj"):
        make("bottleneck", {"modules": ["nope"]}).fits(tiny(), PLACES)


def test_an_adapter_of_another_model_is_refused(tiny: Any) -> None:
    method = make("bottleneck", {"width": 3})
    adapter = moved(method, tiny())
    with pytest.raises(ValueError, match=r"'0.mlp.down_proj.up' \(31, 3\), of rows, width, does not fit a linear map"):
        method.attach(tiny(), PLACES, adapter | {"0.mlp.down_proj.up": torch.zeros(31, 3)})
    with pytest.raises(ValueError, match=r"'0.mlp.down_proj.up' \(32, 2\), of rows, width, does not fit"):
        method.attach(tiny(), PLACES, adapter | {"0.mlp.down_proj.up": torch.zeros(32, 2)})
    with pytest.raises(ValueError, match="0.mlp.down_proj takes down, up, the adapter has down"):
        method.attach(tiny(), PLACES, {key: t for key, t in adapter.items() if key != "0.mlp.down_proj.up"})
    with pytest.raises(ValueError, match="adapter key '0.mlp.down_proj.other' .*expected '<layer>.<path>.<tensor>'"):
        method.attach(tiny(), PLACES, adapter | {"0.mlp.down_proj.other": torch.zeros(1)})
    with pytest.raises(ValueError, match="no linear map 'mlp.nope'; there are self_attn.q_proj"):
        method.attach(tiny(), PLACES, adapter | {"0.mlp.nope.up": torch.zeros(32, 3)})
    with pytest.raises(ValueError, match="the adapter is for layer 4, the model has 3 layers"):
        method.export(Path("nowhere"), adapter, base=tiny(layers=3), base_name="base")
