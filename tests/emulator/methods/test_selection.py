"""Methods that train columns or rows of maps: what they count, what they cost, and that their mean is exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from offsite.coordinator.aggregation import make as strategy
from offsite.coordinator.aggregation.base import Origin, Version
from offsite.emulator.anatomy.narrow import channels, groups, narrow
from offsite.emulator.anatomy.roles import heads, roles
from offsite.emulator.anatomy.structure import layers, linears, shape
from offsite.emulator.methods import Adapter, Method, make

PLACES = {0: 0, 4: 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "columns of all maps": ("paca", {"rank": 3}),
    "columns of some": ("paca", {"rank": 5, "modules": ["q_proj", "down_proj"]}),
    "channels": ("s2ft", {"channels": 0.1}),
    "heads, and rows": ("s2ft", {"channels": 0.1, "groups": 0.5, "before": True}),
}


@pytest.fixture(params=sorted(CASES))
def method(request: pytest.FixtureRequest) -> Method:
    name, settings = CASES[request.param]
    return make(name, settings)


def moved(method: Method, model: Any, *, seed: int = 1) -> Adapter:
    """An adapter that has learned something."""
    torch.manual_seed(seed)
    start = method.start(model, PLACES, seed=0)
    return {key: t if t.dtype == torch.int32 else t + 0.1 * torch.randn_like(t) for key, t in start.items()}


def merged(method: Method, model: Any, adapter: Adapter) -> dict[str, torch.Tensor]:
    method.merge(model, adapter)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_mean_of_changes_is_the_change_of_the_mean(method: Method, tiny: Any) -> None:
    adapters, weights = [moved(method, tiny(), seed=seed) for seed in (1, 2, 3)], (0.5, 0.3, 0.2)
    start = method.start(tiny(), PLACES, seed=0)
    fold = strategy("low-rank", {}).begin(Version(start, {"": start}), method.schema(start))
    for site, adapter, weight in zip("abc", adapters, weights, strict=True):
        fold.add(adapter, Origin(site, "", weight))
    together = merged(method, tiny(), fold.finish([""]).adapter)
    apart = [merged(method, tiny(), adapter) for adapter in adapters]
    for name, tensor in together.items():
        mean = sum(weight * one[name] for weight, one in zip(weights, apart, strict=True))
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)


@torch.no_grad()
def test_attached_merged_and_exported_are_one_change(
    method: Method, tiny: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    adapter = moved(method, tiny())
    expected = method.attach(tiny(), PLACES, adapter)(ids).logits
    assert not torch.allclose(expected, tiny()(ids).logits, atol=1e-2)
    base = tiny()
    method.merge(base, adapter)
    torch.testing.assert_close(base(ids).logits, expected, rtol=1e-4, atol=1e-4)
    method.export(tmp_path, adapter, base=tiny(), base_name="base")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paca", "s2ft"])
def test_families_that_keep_maps_otherwise_train_too(family: str, tiny: Any, ids: torch.Tensor, name: str) -> None:
    method = make(name, {"rank": 3} if name == "paca" else {"channels": 0.2})
    adapter, model = moved(method, tiny(family)), tiny(family)
    expected = method.attach(tiny(family), PLACES, adapter)(ids).logits
    method.merge(model, adapter)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_change_of_a_narrowed_layer_is_that_of_the_entries_it_kept(method: Method, tiny: Any) -> None:
    base, small = tiny(), tiny()
    recovery: dict[str, torch.Tensor] = {}
    for place in PLACES:
        layer, maps = layers(small)[place], roles(small, place)
        units = [
            (channels(layer, maps), torch.arange(1, 48, 2)),
            (groups(layer, maps, heads(small)), torch.tensor([1])),
        ]
        for one, kept in units:
            recovery |= {f"{place}.{name}": index for name, index in narrow(layer, one, kept).items()}
    before = {name: t.clone() for name, t in base.state_dict().items()}
    adapter = moved(method, small)
    narrow_before = {name: t.clone() for name, t in small.state_dict().items()}
    method.merge(small, adapter)
    method.merge(base, method.recover(adapter, recovery))
    changed = 0
    for place in PLACES:
        for path in linears(layers(base)[place]):
            name = f"model.layers.{place}.{path}.weight"
            change, part = base.state_dict()[name] - before[name], small.state_dict()[name] - narrow_before[name]
            rows = recovery.get(f"{place}.{path}.rows", torch.arange(len(change)))
            columns = recovery.get(f"{place}.{path}.columns", torch.arange(change.shape[1]))
            torch.testing.assert_close(change[rows][:, columns], part)
            assert change.count_nonzero() == part.count_nonzero(), "nothing else changes"
            changed += int(part.count_nonzero())
    assert changed


def test_what_trains_is_counted(tiny: Any) -> None:
    model = tiny()
    stack = layers(model)
    start = make("paca", {"rank": 4}).start(model, PLACES, seed=0)
    outs = sum(shape(stack[at].get_submodule(path))[0] for at in PLACES for path in linears(stack[at]))
    assert sum(t.numel() for key, t in start.items() if key.endswith(".change")) == 4 * outs
    d_out, d_in = shape(stack[0].get_submodule("mlp.down_proj"))
    start = make("s2ft", {"channels": 0.25}).start(model, PLACES, seed=0)
    assert sum(t.numel() for key, t in start.items() if key.endswith(".change")) == 2 * d_out * round(0.25 * d_in)
    assert not torch.equal(*(start[f"{at}.mlp.down_proj.columns"] for at in PLACES)), "each layer draws its own"
    other = make("s2ft", {"channels": 0.25}).start(model, {4: 4}, seed=0)
    assert all(torch.equal(start[key], tensor) for key, tensor in other.items()), "whichever other layers train"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("paca", {"rank": 0}, "rank must be at least 1, got 0"),
        ("paca", {"rank": 10_000}, "rank 10000 is more than the 32 columns of 0.self_attn.q_proj"),
        ("paca", {"modules": ["nope"]}, "no linear map of a layer ends in 'nope'; there are self_attn.q_proj"),
        ("s2ft", {"channels": 0.0}, "one of them above 0; got 0.0 and 0.0"),
        ("s2ft", {"channels": 1.5}, "channels and groups are shares in 0..1"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny: Any, name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(name, settings).fits(tiny(), PLACES)


def test_an_adapter_of_another_model_is_refused(tiny: Any) -> None:
    method = make("paca", {"rank": 3})
    adapter = moved(method, tiny())
    beyond = adapter | {"0.mlp.up_proj.columns": torch.tensor([0, 1, 9999], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"columns 0..9999 does not fit a linear map of"):
        method.attach(tiny(), PLACES, beyond)
    with pytest.raises(ValueError, match=r"is not of 2 columns"):
        method.merge(tiny(), adapter | {"0.mlp.up_proj.columns": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="not a change and one index of 0.mlp.up_proj"):
        method.schema({key: t for key, t in adapter.items() if key != "0.mlp.up_proj.columns"})
    with pytest.raises(ValueError, match="'0.mlp.up_proj.other': expected"):
        method.schema(adapter | {"0.mlp.up_proj.other": torch.zeros(1)})


@contextmanager
def kept(model: Any, sizes: dict[int, int]) -> Iterator[None]:
    """Note the bytes of each storage that a forward pass keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def activations(method: Method, model: Any) -> int:
    """Bytes kept by a step on 4 rows of 128 tokens."""
    places = {at: at for at in range(len(layers(model)))}
    attached = method.attach(model, places, method.start(model, places, seed=0)).train()
    ids, sizes = torch.arange(512).view(4, 128) % model.config.vocab_size, dict[int, int]()
    with kept(attached, sizes):
        loss = attached(input_ids=ids, labels=ids).loss
    loss.backward()
    return sum(sizes.values())


def test_less_is_kept_for_the_backward_pass_than_by_lora() -> None:
    # Three layers of SmolLM2's shape; what the head keeps is the same for all.
    config = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config |= {"vocab_size": 64, "num_hidden_layers": 3}
    models = [LlamaForCausalLM(LlamaConfig(**config)) for _ in range(3)]
    lora = activations(make("lora", {"rank": 8}), models[0])
    assert activations(make("paca", {"rank": 8}), models[1]) <= 0.80 * lora
    assert activations(make("s2ft", {}), models[2]) <= 0.70 * lora
