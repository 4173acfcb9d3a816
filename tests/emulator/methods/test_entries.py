"""Methods that train single entries of maps: which those are, that their mean is exact, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.aggregation import make as strategy
from offsite.coordinator.aggregation.base import Origin, Version
from offsite.coordinator.runs import pairs
from offsite.emulator.anatomy.narrow import channels, narrow
from offsite.emulator.anatomy.roles import roles
from offsite.emulator.anatomy.structure import find, linears
from offsite.emulator.formats.packed import dense
from offsite.emulator.methods import Adapter, Method, make
from offsite.emulator.plug import load

PLACES = {0: 0, 4: 4}
MAP = "0.mlp.up_proj"


@pytest.fixture
def method() -> Method:
    return make("sara", {"share": 0.05})


def moved(method: Method, model: Any, *, seed: int = 1) -> Adapter:
    """An adapter that has learned something."""
    torch.manual_seed(seed)
    start = method.start(model, PLACES, seed=0)
    return {key: t if t.dtype == torch.int32 else t + 0.1 * torch.randn_like(t) for key, t in start.items()}


def merged(method: Method, model: Any, adapter: Adapter) -> dict[str, torch.Tensor]:
    method.merge(model, adapter)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_entries_nearest_to_zero_train_and_no_others(method: Method, tiny: Any) -> None:
    model, start = tiny(), method.start(tiny(), PLACES, seed=0)
    for place in PLACES:
        for path in linears(find(model).layers[place]):
            weight = dense(find(model).layers[place].get_submodule(path)).bfloat16().abs().flatten()
            index = start[f"{place}.{path}.index"].long()
            assert len(index) == round(0.05 * len(weight)) == len(index.unique())
            rest = weight[torch.isin(torch.arange(len(weight)), index, invert=True)]
            assert weight[index].max() <= rest.min()
    half = method.start(tiny().bfloat16(), PLACES, seed=1)
    assert all(torch.equal(start[key], tensor) for key, tensor in half.items()), "a copy in 16 bits has the same"


@pytest.mark.parametrize("name", pairs.strategies(make("sara", {})))
def test_the_mean_of_changes_is_the_change_of_the_mean(method: Method, tiny: Any, name: str) -> None:
    adapters, weights = [moved(method, tiny(), seed=seed) for seed in (1, 2, 3)], (0.5, 0.3, 0.2)
    start = method.start(tiny(), PLACES, seed=0)
    fold = strategy(name, {}).begin(Version(start, {"": start}), method.schema(start))
    for site, adapter, weight in zip("abc", adapters, weights, strict=True):
        fold.add(adapter, Origin(site, "", weight))
    together = merged(method, tiny(), fold.finish([""]).adapter)
    apart = [merged(method, tiny(), adapter) for adapter in adapters]
    for key, tensor in together.items():
        mean = sum(weight * one[key] for weight, one in zip(weights, apart, strict=True))
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)


@torch.no_grad()
def test_attached_merged_and_exported_are_one_change_in_every_family(
    method: Method, family: str, tiny: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    adapter, base = moved(method, tiny(family)), tiny(family)
    expected = method.attach(tiny(family), PLACES, adapter)(ids).logits
    assert not torch.allclose(expected, base(ids).logits, atol=1e-3)
    method.merge(base, adapter)
    torch.testing.assert_close(base(ids).logits, expected, rtol=1e-4, atol=1e-4)
    method.export(tmp_path, adapter, base=tiny(family), base_name="base")
    assert torch.equal(load(tiny(family), tmp_path)(ids).logits, expected)


def test_of_merged_weights_only_the_entries_of_the_index_change(method: Method, tiny: Any) -> None:
    adapter, before = moved(method, tiny()), tiny().state_dict()
    for name, tensor in merged(method, tiny(), adapter).items():
        place, _, path = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        index = adapter.get(f"{place}.{path}.index", torch.empty(0)).long()
        assert torch.equal((tensor != before[name]).flatten().nonzero().flatten(), index), name


@torch.no_grad()
def test_a_change_of_a_narrowed_map_is_that_of_the_entries_it_kept(method: Method, tiny: Any) -> None:
    base, small = tiny(), tiny()
    recovery: dict[str, torch.Tensor] = {}
    for place in PLACES:
        layer = find(small).layers[place]
        units = channels(layer, roles(small, place))
        kept = narrow(layer, units, torch.arange(1, 48, 2).flip(0))  # in an order of their own
        recovery |= {f"{place}.{name}": index for name, index in kept.items()}
    before, start = base.state_dict(), moved(method, small)
    before = {name: tensor.clone() for name, tensor in before.items()}
    narrow_before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    method.merge(small, start)
    method.merge(base, method.recover(start, recovery))
    for name, tensor in base.state_dict().items():
        change, part = tensor - before[name], small.state_dict()[name] - narrow_before[name]
        key = name.removeprefix("model.layers.").removesuffix(".weight")
        if change.ndim == 2:
            rows = recovery.get(f"{key}.rows", torch.arange(len(change)))
            columns = recovery.get(f"{key}.columns", torch.arange(change.shape[1]))
            torch.testing.assert_close(change[rows][:, columns], part)
        assert change.count_nonzero() == part.count_nonzero(), name
    with pytest.raises(ValueError, match=r"0.mlp.gate_proj: entries of a map \(48, 32\) do not fit one narrowed to"):
        method.recover(moved(method, tiny()), recovery)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 0.0}, "share is a part of each map's entries, above 0 and at most 1; got 0.0"),
        ({"share": 1.5}, "got 1.5"),
        ({"modules": ["nope"]}, "no linear map of a layer ends in 'nope'; there are self_attn.q_proj"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make("sara", settings).fits(tiny(), PLACES)


def test_an_adapter_of_another_model_or_of_tensors_that_do_not_belong_together_is_refused(
    method: Method, tiny: Any
) -> None:
    adapter = moved(method, tiny())
    index, change = adapter[f"{MAP}.index"], adapter[f"{MAP}.change"]

    def refused(words: str, **parts: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=words):
            method.attach(tiny(), PLACES, adapter | {f"{MAP}.{name}": tensor for name, tensor in parts.items()})

    refused(r"'0.mlp.up_proj.index': expected integers that rise, from 0 to", index=index.flip(0))
    refused(r"'0.mlp.up_proj.index': expected integers that rise", index=index[:1].expand_as(index))
    refused(r"'0.mlp.up_proj.index': expected integers that rise", index=index + 10_000_000)
    refused(r"'0.mlp.up_proj.size': \(7, 9\) is not that of the map", size=torch.tensor([7, 9]))
    refused(r"not \(k,\), \(k,\) and \(2,\)", change=change[1:])
    refused(r"'0.mlp.up_proj.other': expected '<layer>.<path>.change'", other=change)
    with pytest.raises(ValueError, match=r"but not 0.mlp.up_proj.size"):
        method.schema({key: tensor for key, tensor in adapter.items() if key != f"{MAP}.size"})
