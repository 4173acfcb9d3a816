"""Importance of layers: what a useless one is worth, and which choices a coordinator takes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from offsite.emulator import methods, modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.parts import Turn
from offsite.emulator.parts.ist import Ist
from offsite.emulator.parts.responses import losses
from offsite.emulator.parts.training import whole_schema
from offsite.kernels.schema import Field, Rule, Schema

PLACES = {place: 2 * place for place in range(8)}
TURN = Turn(0, 0, "ward")
SCHEMA: Schema = {f"{layer}.{name}": Field("F32", (4, layer + 1), Rule.MEAN) for layer in range(8) for name in "ab"}


@pytest.fixture
def batch() -> Any:
    drawn = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return modality.collate([Tokens(tuple(row), tuple(row)) for row in drawn])


def useless(model: Any, place: int) -> Any:
    """Have a layer add nothing to what it reads."""
    with torch.no_grad():
        for name, parameter in layers(model)[place].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    return model


@torch.no_grad()
def foretold(model: Any, batch: Any) -> Any:
    """Return texts with the targets that a model finds the likeliest, so that each of its layers has a use."""
    likeliest = model(input_ids=batch.input_ids).logits.argmax(-1)
    targets = torch.cat([torch.full_like(likeliest[:, :1], -100), likeliest[:, :-1]], dim=1)
    return replace(batch, labels=targets)


@pytest.mark.parametrize("place", [1, 6])
def test_a_layer_that_adds_nothing_is_among_the_least_important(tiny: Any, batch: Any, place: int) -> None:
    model = useless(tiny(layers=8), place)
    scores = Ist(trials=16).scores(model, PLACES, foretold(model, batch), TURN)
    assert scores.shape == (8,) and scores.dtype == torch.float64
    assert int((scores > scores[place]).sum()) < 2, "its score is in the top quartile"


def test_what_is_scored_stays_as_it_is_and_gives_the_same_scores_again(tiny: Any, batch: Any) -> None:
    model = tiny(layers=8).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (Ist().scores(model, PLACES, batch, TURN) for _ in range(2))
    assert torch.equal(first, second) and model.training and first.any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in layers(model))


def test_of_a_suppressed_response_the_share_is_left(tiny: Any, batch: Any) -> None:
    model = tiny(layers=4)
    (whole,), (kept,), (gone,) = (
        losses(model, batch, [places], rest) for places, rest in (((), 0), ((2,), 1), ((2,), 0))
    )
    (removed,) = losses(useless(tiny(layers=4), 2), batch, [()], 0.0)
    assert kept == pytest.approx(whole, rel=1e-6) and gone == pytest.approx(removed, rel=1e-6) != whole


def test_layers_of_low_scores_are_chosen_far_more_often() -> None:
    part, scores = Ist(share=0.25), [4.0] * 4 + [-4.0] * 4
    chosen = [part.choose(SCHEMA, TURN._replace(round=number), scores) for number in range(100)]
    assert {len(one) for one in chosen} == {2} and all(one == tuple(sorted(one)) for one in chosen)
    assert sum(layer >= 4 for one in chosen for layer in one) > 180


def test_a_coordinator_takes_any_right_number_of_layers_and_no_others() -> None:
    part = Ist(share=0.25)
    assert part.groups(SCHEMA, TURN, (0, 5)) == {"0.a", "0.b", "5.a", "5.b"}
    assert part.largest(SCHEMA) == (6, 7)
    for chosen in ((), (1,), (1, 2, 3), (5, 0), (1, 1), (1, 8)):
        with pytest.raises(ValueError, match="part ist trains 2 of the layers 0, 1, 2, 3, 4, 5, 6, 7, in ascending"):
            part.groups(SCHEMA, TURN, chosen)
    with pytest.raises(ValueError, match="has 3 scores, and the adapter 8 layers"):
        part.choose(SCHEMA, TURN, [0.0] * 3)


def test_at_least_one_layer_trains(tiny: Any) -> None:
    method = methods.make("lora", {"rank": 2})
    schema = whole_schema(method, method.start(tiny(layers=4), {0: 0, 3: 3}, seed=0))
    assert Ist().choose(schema, TURN, [500.0, -500.0]) == (3,)


def test_without_a_finite_loss_there_is_no_choice(tiny: Any, batch: Any) -> None:
    model = tiny(layers=8)
    with torch.no_grad():
        layers(model)[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss of the emulator is nan, so that part ist cannot tell"):
        Ist().scores(model, PLACES, batch, TURN)
