"""What every method owes, on an emulator that has what it trains, run over the family's own mapping."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.emulator import builders
from offsite.emulator.builders import Material
from offsite.emulator.methods import METHODS, Adapter, Method, make
from offsite.emulator.modality import Batch, encode
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Ends
from offsite.emulator.plug import load, plug
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.kernels.schema import Rule, rules, settle
from offsite.protos import tensors

TRAINED = {"0", "5"}  # layers of a base of six


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    return make(request.param, {})


@pytest.fixture
def draft(method: Method, tiny: Any, text: list[Batch]) -> Draft:
    """The smallest emulator with what the method needs."""
    names = [builders.providers(need).split()[0] for need in sorted(method.needs)] or ["whole"]
    chain = [builders.make(name, {}) for name in names]
    return builders.run(chain, Ends(1, 1), tiny(), Material(batches=text))


@pytest.fixture
def start(method: Method, draft: Draft) -> Adapter:
    return method.start(draft.model, draft.outline.places, seed=0)


@pytest.fixture
def trained(method: Method, draft: Draft, start: Adapter, tokenizer: Any) -> Any:
    """The emulator with an adapter that has learned for two steps."""
    places = draft.outline.places
    examples = [TextExample("", " ".join(f"w{3 + (7 * row + at) % 80}" for at in range(12))) for row in range(8)]
    model = method.attach(draft.model, places, start)
    tune(model, method.named_parameters(model, places), encode(examples, tokenizer, max_length=16), Schedule(2, 0.05))
    return model


def entries(adapter: Adapter, folder: Path) -> dict[str, tensors.Entry]:
    tensors.save(folder / "adapter", adapter)
    return tensors.header(folder / "adapter")


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
    assert layers_of(start) == TRAINED
    settled = settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})
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
    state = method.state(trained, places)
    fixed = {key for key, field in method.schema(start).items() if field.rule is Rule.FIXED}
    assert live.keys() == state.keys() - fixed and all(torch.equal(start[key], state[key]) for key in fixed)
    assert all(torch.equal(parameter.detach(), state[key]) for key, parameter in live.items())
    same = [key for key in live if torch.equal(start[key], state[key])]
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
    assert names and {name.partition("layers.")[2].partition(".")[0] for name in names} == TRAINED
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
