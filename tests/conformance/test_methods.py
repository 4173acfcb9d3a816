"""What every method owes, on an emulator that has what it trains, run over the family's own mapping."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.emulator import builders
from offsite.emulator.anatomy.roles import heads, roles
from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.builders import Material
from offsite.emulator.methods import METHODS, Adapter, Method, make
from offsite.emulator.methods.base import Carrying, Measuring
from offsite.emulator.methods.initial import INITS
from offsite.emulator.methods.soka import Grid
from offsite.emulator.modality import Batch, collate, encode
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Ends
from offsite.emulator.plug import load, plug
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.kernels.schema import Rule, Schema, factors, groups, rules, settle
from offsite.protos import tensors

TRAINED = {"0", "5"}  # layers of a base of six
# One of each kind; CI runs those that are built like them.
SAMPLE = {
    *("amt", "bi-lora", "blocks", "bottleneck", "grids", "invertible", "lora", "miss", "moments", "mos", "mosa"),
    *("oft", "paca", "s2ft", "spiel", "spt", "vera"),
}


def case(name: str, *settings: dict[str, Any]) -> Any:
    """Return a parameter of a test, slow for those of our methods that are like one of the sample."""
    beyond = METHODS[name].__module__.startswith("offsite.emulator.") and name not in SAMPLE
    return pytest.param(name, *settings, marks=[pytest.mark.slow] * beyond)


SETTINGS: dict[str, dict[str, Any]] = {  # with which a tiny model has all kinds of tensors
    "apet": {"share": 0.25},
    "fisher": {"method": "ssf"},  # of which everything has a gradient at the start
    "spt": {"share": 0.1},
}
VARIANTS: list[Any] = [
    *(case(name, {}) for name in sorted(METHODS)),
    ("s2ft", {"channels": 0.3, "groups": 0.5, "before": True}),
    ("s2ft", {"channels": 0.0, "groups": 0.1}),
    ("bottleneck", {"form": "parallel"}),
    ("bottleneck", {"biases": True, "modules": "mlp-output"}),
    *(("lora", {"init": init}) for init in INITS),
    ("moments", {"of": "gradients"}),
    ("moments", {"of": "squares"}),
    ("apet", {"share": 0.25}),
    ("spt", {"share": 0.1}),
]


@pytest.fixture(
    params=[*(case(name) for name in sorted(METHODS)), *(f"lora {init}" for init in INITS)]  # a start of its own kind
)
def method(request: pytest.FixtureRequest) -> Method:
    name, _, init = request.param.partition(" ")
    return make(name, {"init": init} if init else SETTINGS.get(name, {}))


def emulator(method: Method, base: Any, text: list[Batch]) -> Draft:
    """Build the smallest emulator with what a method needs."""
    names = [builders.providers(need).split()[0] for need in sorted(method.needs)] or ["whole"]
    chain = [builders.make(name, {}) for name in names]
    return builders.run(chain, Ends(1, 1), base, Material(batches=text))


@pytest.fixture(scope="module")
def once() -> dict[str, Any]:
    """What of a method is made once, for tests that take a copy of it."""
    return {}


@pytest.fixture
def draft(method: Method, tiny: Any, text: list[Batch], once: dict[str, Any]) -> Draft:
    if f"draft of {method}" not in once:
        once[f"draft of {method}"] = emulator(method, tiny(), text)
    return copy.deepcopy(once[f"draft of {method}"])


@pytest.fixture
def start(method: Method, draft: Draft) -> Adapter:
    return method.start(draft.model, draft.outline.places, seed=0)


@pytest.fixture
def trained(method: Method, draft: Draft, start: Adapter, tokenizer: Any, once: dict[str, Any]) -> Any:
    """The emulator with an adapter that has learned for two steps, or measured a batch."""
    if f"trained {method}" not in once:
        once[f"trained {method}"] = learned(method, copy.deepcopy(draft), start, tokenizer)
    return copy.deepcopy(once[f"trained {method}"])


def learned(method: Method, draft: Draft, start: Adapter, tokenizer: Any) -> Any:
    places = draft.outline.places
    examples = [TextExample("", " ".join(f"w{3 + (7 * row + at) % 80}" for at in range(12))) for row in range(8)]
    model = method.attach(draft.model, places, start)
    samples = encode(examples, tokenizer, max_length=16)
    if isinstance(method, Measuring):
        method.measure(model, places, collate(samples))
    else:
        tune(model, method.named_parameters(model, places), samples, Schedule(2, 0.05))
    return model


def entries(adapter: Adapter, folder: Path) -> dict[str, tensors.Entry]:
    tensors.save(folder / "adapter", adapter)
    return tensors.header(folder / "adapter")


def schema_of(method: Method, start: Adapter) -> Schema:
    return settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})


def moving(method: Method, start: Adapter) -> set[str]:
    """The tensors that steps change: not what is fixed, nor an index."""
    return {key for key, field in schema_of(method, start).items() if field.trained}


def packed(method: Method, start: Adapter) -> set[str]:
    """Those of them that are bits, which are made of what trains."""
    return {key for key, field in schema_of(method, start).items() if field.bits is not None}


def layers(method: Method) -> set[str]:
    """The layers of an adapter: all that train, or the lowest alone where nothing is of each."""
    return TRAINED if method.formula.values != "0" else {min(TRAINED)}


def layers_of(adapter: Any) -> set[str]:
    return {key.partition(".")[0] for key in adapter}


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_a_start_changes_nothing_and_is_read_back_bit_for_bit(
    method: Method, draft: Draft, start: Adapter, ids: torch.Tensor, tmp_path: Path
) -> None:
    places = draft.outline.places
    again = method.start(draft.model, places, seed=0)
    assert start and start.keys() == again.keys() and all(torch.equal(start[key], again[key]) for key in start)
    assert layers_of(start) == layers(method)
    settled = schema_of(method, start)
    assert rules(settled) == method.rules
    assert {key: tensors.Entry(field.dtype, field.shape) for key, field in settled.items()} == entries(start, tmp_path)
    with torch.no_grad():
        before = draft.model(ids).logits
        model = method.attach(draft.model, places, start)
        torch.testing.assert_close(model(ids).logits, before)
    state = method.state(model, places)
    assert state.keys() == start.keys() and all(torch.equal(state[key], start[key]) for key in start)


def test_every_tier_starts_from_tensors_of_one_schema_and_no_other_tier_does(
    method: Method, draft: Draft, start: Adapter
) -> None:
    places, schema = draft.outline.places, method.schema(start)
    assert method.tier_at("anybody") in method.tiers()
    for tier in method.tiers():
        own = method.start(draft.model, places, seed=0, tier=tier)
        settle(schema, {key: tensor.shape for key, tensor in own.items()})
    if method.tiers() != {""}:
        with pytest.raises(ValueError, match="no-such-tier"):
            method.start(draft.model, places, seed=0, tier="no-such-tier")
    assert method.withheld <= {field.name for field in fields(method)}  # type: ignore[arg-type]


def test_what_has_a_gradient_is_the_adapter_and_all_of_it_learns(
    method: Method, draft: Draft, start: Adapter, trained: Any
) -> None:
    places = draft.outline.places
    live = method.named_parameters(trained, places)
    assert {id(p) for p in trained.parameters() if p.requires_grad} == {id(p) for p in live.values()}
    assert all(parameter.dtype == torch.float32 for parameter in live.values())
    state, schema, bits = method.state(trained, places), schema_of(method, start), packed(method, start)
    still = {key for key, field in schema.items() if field.rule is Rule.FIXED or field.below is not None}
    moves = moving(method, start)
    assert live.keys() == (set() if isinstance(method, Measuring) else moves)
    assert all(torch.equal(start[key], state[key]) for key in still)
    assert all(torch.equal(live[key].detach(), state[key]) for key in live.keys() - bits)
    assert all(live[key].numel() == schema[key].trained for key in bits)
    together = {key: groups(schema)[schema[key].group or key] if key in bits else [key] for key in moves}
    same = [key for key in moves if all(torch.equal(start[one], state[one]) for one in together[key])]
    assert not same, f"these did not learn: {same[:3]}"


def test_what_was_trained_comes_back_to_the_layers_of_the_base_that_train_and_to_no_others(
    method: Method, draft: Draft, trained: Any, tiny: Any, ids: torch.Tensor
) -> None:
    recovered = method.recover(method.state(trained, draft.outline.places), draft.recovery)
    base, other = tiny(), tiny()
    original = copied(base)
    if method.mergeable:
        method.merge(base, recovered)
        names = changed(base, original)
    else:  # what the emulator learned, it learned on layers that are the base's
        base, names = trained.eval(), copied(plug(other, method, recovered)).keys() - original.keys()
    assert names and {name.partition("layers.")[2].partition(".")[0] for name in names} == layers(method)
    with torch.no_grad():
        plugged = plug(tiny(), method, recovered)(ids).logits
        torch.testing.assert_close(plugged, base(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_start_that_comes_back_changes_nothing(
    method: Method, draft: Draft, start: Adapter, tiny: Any, ids: torch.Tensor
) -> None:
    base, recovered = tiny(), method.recover(start, draft.recovery)
    original = copied(base)
    if method.mergeable:
        method.merge(base, recovered)
        assert not changed(base, original)
    else:
        with torch.no_grad():
            torch.testing.assert_close(plug(base, method, recovered)(ids).logits, tiny()(ids).logits)


def test_what_weights_cannot_take_in_stays_beside_them_and_is_never_merged(
    method: Method, draft: Draft, start: Adapter, tiny: Any
) -> None:
    if not method.mergeable:
        assert method.attaches
        with pytest.raises(ValueError, match=f"{method.name}.*beside"):
            method.merge(tiny(), method.recover(start, draft.recovery))


def test_an_adapter_that_does_not_fit_is_refused_by_its_key(method: Method, draft: Draft, start: Adapter) -> None:
    first = next(iter(start))
    moved = {key.replace(f"{first.partition('.')[0]}.", "77.", 1): value for key, value in start.items()}
    with pytest.raises(ValueError, match=r"\b(77|0)\b"):
        method.attach(draft.model, draft.outline.places, moved)


def test_an_export_is_safetensors_and_words_and_is_put_beside_the_base_again(
    method: Method, draft: Draft, trained: Any, tiny: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    recovered = method.recover(method.state(trained, draft.outline.places), draft.recovery)
    method.export(tmp_path / "out", recovered, base=tiny(), base_name="base")
    files = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert ".safetensors" in files and files <= {".safetensors", ".json", ".md"}
    if method.attaches:
        with torch.no_grad():
            loaded = load(tiny(), tmp_path / "out")(ids).logits
            torch.testing.assert_close(loaded, plug(tiny(), method, recovered)(ids).logits)


def sizes(draft: Draft, start: Adapter, each: str) -> list[dict[str, float]]:
    """Return the sizes that a formula is of: those of each map that an adapter is of, or of each layer."""
    stack, places = find(draft.model).layers, draft.outline.places
    if each == "map":
        position = {layer: place for place, layer in places.items()}
        names = {key.rpartition(".")[0] for key in start}
        maps = [stack[position[int(name.partition(".")[0])]].get_submodule(name.partition(".")[2]) for name in names]
        pairs = [{"pair": len(start[f"{name}.A"]) if f"{name}.A" in start else 0} for name in names]
        known = [dict(zip(("d_out", "d_in"), shape(one), strict=True)) | _more(one) for one in maps]
        return [one | pair for one, pair in zip(known, pairs, strict=True)]
    found = []
    for place in places:
        maps = roles(draft.model, place)
        d, d_ff = shape(stack[place].get_submodule(maps.mlp_out))
        count, kv, width = heads(draft.model).__dict__.values()
        parameters = sum(parameter.numel() for parameter in stack[place].parameters())
        found.append({"d": d, "d_ff": d_ff, "inward": len(maps.mlp_in), "heads": count, "kv": kv, "width": width})
        found[-1]["parameters"] = parameters
    return found


def _more(linear: Any) -> dict[str, float]:
    grids = {"grids": linear.grid.shape[1]} if hasattr(linear, "grid") else {}
    return {"bias": linear.bias is not None, "cells": Grid.of(*shape(linear)).cells} | grids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_as_many_values_train_as_its_formula_says(
    name: str, settings: dict[str, Any], family: str, tiny: Any, text: list[Batch]
) -> None:
    method = make(name, settings)
    draft = emulator(method, tiny(family, layers=3), text)
    try:
        method.fits(draft.model, draft.outline.places)
    except ValueError:  # for maps that GPT-2 does not have, or stores the other way round
        assert family == "gpt2"
        return
    start = method.start(draft.model, draft.outline.places, seed=0)
    values = sum(field.trained for field in schema_of(method, start).values())
    if isinstance(method, Carrying):  # one for each of that method's, and the count
        of = METHODS[method.carries[0]](**method.carries[1])  # type: ignore[call-arg]
        inner = of.start(draft.model, draft.outline.places, seed=0)
        assert values == 1 + sum(field.trained for field in schema_of(of, inner).values())
        return
    own = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    each, formula = sizes(draft, start, method.formula.each), method.formula
    once = eval(formula.once, {}, own | each[0]) if formula.once else 0
    assert each and once + sum(eval(formula.values, {}, own | one) for one in each) == values
    live = method.named_parameters(method.attach(draft.model, draft.outline.places, start), draft.outline.places)
    assert isinstance(method, Measuring) or values == sum(parameter.numel() for parameter in live.values())


def test_the_mean_of_adapters_changes_a_model_by_the_mean_of_their_changes_where_the_method_says_so(
    method: Method, draft: Draft, start: Adapter, tiny: Any
) -> None:
    if not method.mergeable or packed(method, start):
        assert method.linear == isinstance(method, Measuring)  # there is no W that it changes, or no mean of bits
        return
    moves, drawn = moving(method, start), torch.Generator().manual_seed(0)
    one, other = (
        {
            key: tensor + 0.3 * torch.randn(tensor.shape, generator=drawn) if key in moves else tensor
            for key, tensor in start.items()
        }
        for _ in range(2)
    )
    mean = {key: (tensor + other[key]) / 2 if key in moves else tensor for key, tensor in one.items()}
    for B, A in factors(method.schema(start)).values():
        mean |= {A: torch.cat([one[A], other[A]]), B: torch.cat([one[B], other[B]], dim=1) / 2}
    merged = []
    for adapter in (one, other, mean):
        base = tiny()
        method.merge(base, method.recover(adapter, draft.recovery))
        merged.append(torch.cat([parameter.detach().flatten() for parameter in base.parameters()]))
    apart = float((merged[2] - (merged[0] + merged[1]) / 2).abs().max())
    assert apart < 1e-4 if method.linear else apart > 1e-2


def test_a_start_is_drawn_from_the_seed_where_the_method_says_so(method: Method, draft: Draft, start: Adapter) -> None:
    other = method.start(draft.model, draft.outline.places, seed=1)
    same = start.keys() == other.keys() and all(torch.equal(start[key], other[key]) for key in start)
    assert same != method.seeded
