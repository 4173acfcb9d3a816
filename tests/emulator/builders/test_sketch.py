"""Sketched emulators and the training of their grids, over all families."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from offsite.emulator import builders, methods, modality
from offsite.emulator.activations import mean_squares
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import find, is_transposed, layers, linears, shape
from offsite.emulator.builders import Material
from offsite.emulator.builders.sketched import Sketched
from offsite.emulator.formats.packed import PackedLinear, dense
from offsite.emulator.formats.sketch import Sketch
from offsite.emulator.methods import Adapter
from offsite.emulator.methods.grids import Grids
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Ends, Kept

GRIDS = Grids()


def sketched(base: nn.Module, text: list[Batch], *, first: Any = None, **settings: Any) -> Draft:
    chain = [*([first] if first else []), Sketched(**settings)]
    return builders.run(chain, Ends(1, 1), base, Material(batches=text))


def moved(adapter: Adapter, *, by: float = 0.05, seed: int = 3) -> Adapter:
    """An adapter as if trained."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value + by * torch.randn(value.shape, generator=generator) for key, value in adapter.items()}


def with_weights(base: nn.Module, changed: dict[tuple[int, str], Tensor]) -> nn.Module:
    """A copy of the base with other matrices in some places."""
    twin = copy.deepcopy(base)
    for (place, path), weight in changed.items():
        linear: Any = layers(twin)[place].get_submodule(path)
        linear.weight.data = (weight.T if is_transposed(linear) else weight).contiguous()
    return twin


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_has_sixteen_values_for_each_row_group(name: str, tiny: Any, text: list[Batch]) -> None:
    base = tiny(name, 3)
    draft = sketched(base, text, groups=2)
    adapter = GRIDS.start(draft.model, draft.outline.places, seed=0)
    rows = [shape(layers(base)[place].get_submodule(path))[0] for place in (0, 2) for path in linears(layers(base)[0])]
    assert sum(value.numel() for value in adapter.values()) == sum(rows) * 2 * 16
    assert {key.split(".")[0] for key in adapter} == {"0", "2"}
    assert all(value.dtype == torch.float32 for value in adapter.values())


@torch.no_grad()
def test_a_sketched_model_computes_what_its_decoded_weights_do(
    family: str, tiny: Any, text: list[Batch], ids: Tensor
) -> None:
    base = tiny(family, 3)
    before = snapshot(base)
    draft = sketched(base, text)
    stack = layers(draft.model)
    weights = {(at, path): dense(stack[at].get_submodule(path)) for at in range(3) for path in linears(stack[at])}
    assert all(isinstance(stack[at].get_submodule(path), PackedLinear) for at, path in weights)
    logits = draft.model(ids).logits
    torch.testing.assert_close(logits, with_weights(base, weights)(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, base(ids).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@torch.no_grad()
def test_trained_grids_change_the_base_as_they_changed_the_sketch(
    family: str, tiny: Any, text: list[Batch], ids: Tensor, tmp_path: Path
) -> None:
    base = tiny(family, 3)
    draft = sketched(base, text, groups=2)
    places = draft.outline.places
    trained = moved(GRIDS.start(draft.model, places, seed=0))
    before = snapshot(draft.model)
    emulator = GRIDS.attach(copy.deepcopy(draft.model), places, trained)
    maps = [(place, path) for place in places for path in linears(layers(base)[place])]
    change = {
        at: dense(layers(emulator)[at[0]].get_submodule(at[1])) - dense(layers(draft.model)[at[0]].get_submodule(at[1]))
        for at in maps
    }
    recovered = GRIDS.recover(trained, draft.recovery)
    assert recovered.keys() == {f"{place}.{path}.change" for place, path in maps}

    GRIDS.export(tmp_path / "plug-in", recovered, base=base, base_name="base")
    tuned = copy.deepcopy(base)
    GRIDS.merge(tuned, recovered)
    expected = {at: dense(layers(base)[at[0]].get_submodule(at[1])) + change[at] for at in maps}
    torch.testing.assert_close(tuned(ids).logits, with_weights(base, expected)(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tuned(ids).logits, base(ids).logits, atol=1e-2)

    files = load_file(tmp_path / "plug-in" / "changes.safetensors")
    state = base.state_dict()
    assert files.keys() == {f"{find(base).path}.{place}.{path}.weight" for place, path in maps}
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(state[name] + files.get(name, torch.zeros(())), tensor, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_lowers_the_loss_and_changes_nothing_but_grids(name: str, tiny: Any, text: list[Batch]) -> None:
    draft = sketched(tiny(name, 3), text)
    places = draft.outline.places
    model = GRIDS.attach(draft.model, places, GRIDS.start(draft.model, places, seed=0))
    before, live = snapshot(model), GRIDS.named_parameters(model, places)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in live.values()}
    optimiser = torch.optim.AdamW(live.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        now = modality.loss(model, text[0])
        losses.append(now.item())
        optimiser.zero_grad()
        now.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and bool(p.grad.any()) for p in live.values())
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    path = find(model).path
    assert changed == {f"{path}.{key}" for key in live}  # the places of a whole model are its layers
    state = GRIDS.state(model, places)
    assert not any(torch.equal(draft.recovery[key], value) for key, value in state.items())


def test_a_dense_twin_has_the_gradients_that_the_grids_gather(tiny: Any, text: list[Batch]) -> None:
    base = tiny("llama", 3)
    draft = sketched(base, text, groups=4)
    places = draft.outline.places
    model = GRIDS.attach(draft.model, places, GRIDS.start(draft.model, places, seed=0))
    stack = layers(model)
    weights = {(at, path): dense(stack[at].get_submodule(path)) for at in range(3) for path in linears(stack[at])}
    twin = with_weights(base, weights)
    modality.loss(twin, text[0]).backward()  # type: ignore[no-untyped-call]
    modality.loss(model, text[0]).backward()  # type: ignore[no-untyped-call]
    for key, parameter in GRIDS.named_parameters(model, places).items():
        layer, _, path = key.removesuffix(".grid").partition(".")
        full: Any = layers(twin)[int(layer)].get_submodule(path)
        packed: Any = stack[int(layer)].get_submodule(path)
        d_out, groups, _ = parameter.shape
        codes = torch.stack([packed.codes & 15, packed.codes >> 4], dim=-1).view(d_out, groups, -1).long()
        expected = torch.zeros(parameter.shape).scatter_add_(2, codes, full.weight.grad.view(codes.shape))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_sites_grids_is_the_mean_of_their_models(tiny: Any, text: list[Batch]) -> None:
    draft = sketched(tiny("llama", 3), text)
    start = GRIDS.start(draft.model, draft.outline.places, seed=0)
    sites = [moved(start, seed=seed) for seed in range(4)]
    mean = {key: torch.stack([site[key] for site in sites]).mean(dim=0) for key in start}
    changes = [GRIDS.recover(site, draft.recovery) for site in sites]
    for key, change in GRIDS.recover(mean, draft.recovery).items():
        expected = torch.stack([site[key] for site in changes]).mean(dim=0)
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    assert not any(value.any() for value in GRIDS.recover(start, draft.recovery).values())


def test_one_group_of_a_smollm2_takes_less_than_a_third_of_fp16() -> None:
    maps = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    stored = sum(
        torch.Size(part).numel() * dtype.itemsize
        for d_out, d_in in maps
        for part, dtype in Sketch(groups=1).shapes(d_out, d_in).values()
    )
    assert stored <= 0.33 * sum(2 * d_out * d_in for d_out, d_in in maps)


def test_frozen_layers_can_be_sketched_alone_for_lora(tiny: Any, text: list[Batch], ids: Tensor) -> None:
    base = tiny("llama", 4)
    draft = sketched(base, text, layers="frozen")
    assert draft.recovery == {}
    for place, layer in enumerate(layers(draft.model)):
        found = [isinstance(layer.get_submodule(path), PackedLinear) for path in linears(layer)]
        assert all(found) if place in (1, 2) else not any(found)
    with pytest.raises(ValueError, match="build the emulator with the builder sketch"):
        GRIDS.start(draft.model, draft.outline.places, seed=0)
    lora = methods.make("lora", {"rank": 2})
    start = lora.start(draft.model, draft.outline.places, seed=0)
    before = draft.model(ids).logits
    torch.testing.assert_close(lora.attach(draft.model, draft.outline.places, start)(ids).logits, before)


def test_shared_places_have_one_sketch_between_them(tiny: Any, text: list[Batch]) -> None:
    base = tiny("llama", 6)
    draft = sketched(base, text, first=builders.make("crash", {"keep": 4, "sharing": "on"}))
    assert len(draft.outline.shared) == 2
    stack = layers(draft.model)
    for place, source in draft.outline.shared.items():
        for path in linears(stack[place]):
            one, other = (stack[at].get_submodule(path) for at in (place, source))
            assert isinstance(one, PackedLinear) and one is not other
            assert one.get_buffer("codes").data_ptr() == other.get_buffer("codes").data_ptr()
            assert one.get_parameter("grid").data_ptr() == other.get_parameter("grid").data_ptr()


def test_keys_are_those_of_the_base_where_layers_were_dropped(tiny: Any, text: list[Batch]) -> None:
    base = tiny("llama", 6)
    draft = sketched(base, text, first=builders.make("uniform", {"keep": 4}))
    assert draft.outline.places == {0: 0, 3: 5}
    adapter = moved(GRIDS.start(draft.model, draft.outline.places, seed=0))
    assert {key.split(".")[0] for key in adapter} == {"0", "5"}
    assert adapter.keys() == {key for key in draft.recovery if key.endswith(".grid")}
    GRIDS.merge(base, GRIDS.recover(adapter, draft.recovery))


def test_the_change_of_a_narrowed_map_goes_where_it_came_from() -> None:
    rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 4, 7])
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    grid = torch.zeros(3, 1, 16)
    recovery = {"7.up.codes": codes, "7.up.grid": grid, "7.up.shape": torch.tensor([6, 8])}
    recovery |= {"7.up.rows": rows, "7.up.columns": columns}
    change = GRIDS.recover({"7.up.grid": grid + torch.tensor([1.0, 2.0, 3.0])[:, None, None]}, recovery)["7.up.change"]
    assert change.shape == (6, 8) and float(change.sum()) == 4 * (1 + 2 + 3)
    assert torch.equal(change[rows][:, columns], torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4))


def test_what_does_not_fit_is_refused(tiny: Any, text: list[Batch], ids: Tensor) -> None:
    base = tiny("llama", 3)
    places = {0: 0, 2: 2}
    with pytest.raises(ValueError, match="build the emulator with the builder sketch"):
        GRIDS.attach(base, places, {})
    with pytest.raises(ValueError, match="calibration text"):
        sketched(base, [])
    with pytest.raises(ValueError, match="use fewer groups"):
        sketched(base, text, groups=5)
    with pytest.raises(ValueError, match="nothing to pack"):
        builders.run([Sketched(layers="frozen")], Kept(), base, Material(batches=text))
    draft = sketched(base, text)
    start = GRIDS.start(draft.model, places, seed=0)
    key = next(iter(start))
    before = draft.model(ids).logits
    with pytest.raises(ValueError, match="does not take the adapter's keys"):
        GRIDS.attach(draft.model, places, {name: value for name, value in start.items() if name != key})
    with pytest.raises(ValueError, match="does not fit the model"):
        GRIDS.attach(draft.model, places, start | {key: torch.zeros(1, 1, 16)})
    with pytest.raises(ValueError, match="no such grid"):
        GRIDS.recover({"1.self_attn.q_proj.grid": start[key]}, draft.recovery)
    with pytest.raises(ValueError, match="does not fit the model"):
        GRIDS.recover({key: torch.zeros(1, 1, 16)}, draft.recovery)
    for name in ("9.self_attn.q_proj.change", "0.self_attn.no_such.change", key):
        with pytest.raises(ValueError, match="'"):
            GRIDS.merge(base, {name: torch.zeros(1, 1)})
    torch.testing.assert_close(draft.model(ids).logits, before)


@torch.no_grad()
def test_inputs_are_measured_without_padding_and_over_all_places_that_share_a_map(tiny: Any, text: list[Batch]) -> None:
    model = restack(tiny("llama", 3), (0, 1, 2), {1: 0})
    path = "mlp.down_proj"
    heard: list[Tensor] = []
    for place in (0, 1):
        layers(model)[place].get_submodule(path).register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    found = mean_squares(model, {(0, path): 0, (1, path): 0}, text)
    masks = [batch.attention_mask.bool() for batch in text for _ in range(2)]
    assert not all(mask.all() for mask in masks)
    rows = torch.cat([given[mask] for given, mask in zip(heard, masks, strict=True)])
    torch.testing.assert_close(found[0, path].float(), rows.square().mean(dim=0))
