"""Adapters that answer together: their probabilities, what their models share, and how a published ensemble loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.ensemble import Ensemble, together, twin
from offsite.emulator.methods import Adapter, Method, make
from offsite.emulator.plug import ENSEMBLE, load, plug, plug_all

PLACES = {0: 0, 4: 4}


def trained(method: Method, model: Any, seed: int) -> Adapter:
    """An adapter as training leaves it: what is fixed stays."""
    start, draw = method.start(model, PLACES, seed=0), torch.Generator().manual_seed(seed)
    return {
        key: one + 0.2 * torch.randn(one.shape, generator=draw) if one.dtype == torch.float32 else one
        for key, one in start.items()
    }


def test_of_each_token_the_largest_probability_counts() -> None:
    one, other = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    expected = torch.tensor([[0.7, 0.3, 0.6]]) / 1.6
    logits = one.log() + 5.0, other.log() - 2.0  # a constant makes no difference
    torch.testing.assert_close(together(logits).exp(), expected)
    torch.testing.assert_close(together(reversed(logits)), together(logits))
    torch.testing.assert_close(together([logits[0]] * 3).exp(), one)


def test_probabilities_that_are_hardly_any_stay_numbers() -> None:
    one, other = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    given = together([one.half(), other.half()])
    torch.testing.assert_close(given.exp(), torch.tensor([[0.5, 0.0, 0.5]]))
    assert given.dtype == torch.float32 and bool(given.isfinite().all()) and given[0, 1] < -9e3


def test_a_twin_has_the_layers_that_are_its_own_and_shares_the_rest(tiny: Any, ids: torch.Tensor) -> None:
    model = tiny()
    expected, copy = model(ids).logits, twin(model, [1])
    own = {id(one) for one in layers(copy)[1].parameters()}
    shared = {id(one) for one in model.parameters()} & {id(one) for one in copy.parameters()}
    assert own and not own & shared and len(shared) == len([*model.parameters()]) - len(own)
    assert torch.equal(copy(ids).logits, expected)
    with torch.no_grad():
        for one in layers(copy)[1].parameters():
            one.zero_()
    assert torch.equal(model(ids).logits, expected) and not torch.equal(copy(ids).logits, expected)


@pytest.mark.parametrize("name", ["lora", "blocks", "bottleneck", "paca", "spiel"])
@torch.no_grad()
def test_each_expert_is_what_it_is_alone(name: str, tiny: Any, ids: torch.Tensor) -> None:
    method, base = make(name, {}), tiny()
    before = {key: one.clone() for key, one in base.state_dict().items()}
    adapters = {name: trained(method, base, seed) for seed, name in enumerate(("on.line", "offline"))}
    model = plug_all(base, method, adapters)
    assert isinstance(model, Ensemble) and model.names == ("on.line", "offline")
    alone = [plug(tiny(), method, one)(ids).logits for one in adapters.values()]
    for expert, logits in zip(model.experts, alone, strict=True):
        torch.testing.assert_close(expert(ids).logits, logits)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, together(alone))
    assert all(torch.equal(one, before[key]) for key, one in base.state_dict().items()), "the base stays as it is"
    assert plug_all(base, method, {"only": adapters["offline"]})(ids).logits.equal(alone[1])


@torch.no_grad()
def test_a_published_ensemble_loads_and_is_scored_as_one_model(tiny: Any, tmp_path: Path) -> None:
    method, base = make("lora", {"rank": 2}), tiny()
    adapters = {"online": trained(method, base, 0), "offline": trained(method, base, 1)}
    folders = {"online": "adapter", "offline": "experts/offline"}
    for name, folder in folders.items():
        method.export(tmp_path / folder, adapters[name], base=base, base_name="tiny")
    document = {"combine": "max", "experts": folders}
    (tmp_path / ENSEMBLE).write_text(json.dumps(document))
    loaded, made = load(tiny(), tmp_path), plug_all(base, method, adapters)
    batch = modality.default().probe(base, rows=3, length=9)
    score = modality.score(loaded, [batch])
    assert score.mean == pytest.approx(modality.score(made, [batch]).mean, rel=1e-5)
    assert score.mean != pytest.approx(modality.score(made.experts[0], [batch]).mean, rel=1e-3)
    with pytest.raises(ValueError, match="goes on from no past_key_values"):
        loaded(batch.input_ids, past_key_values=object())
    (tmp_path / ENSEMBLE).write_text(json.dumps(document | {"combine": "route"}))
    with pytest.raises(ValueError, match="one has to be chosen .* load one of the folders adapter, experts/offline"):
        load(tiny(), tmp_path)
    (tmp_path / ENSEMBLE).write_text("{}")
    with pytest.raises(ValueError, match="expected how adapters answer together, got KeyError"):
        load(tiny(), tmp_path)
