"""Methods whose entries each site chooses: where the gradient is largest, as many as before, and no others change."""

from typing import Any

import pytest
import torch

from offsite.emulator import modality
from offsite.emulator.methods import Adapter, Method, make
from offsite.emulator.methods.base import Choosing
from offsite.emulator.modality import Batch

PLACES = {0: 0, 4: 4}
NAMES = ("lt-sft", "spiel")
MAP = "0.mlp.up_proj"


def grown(method: Method, model: Any, start: Adapter, batch: Batch) -> Adapter:
    """The adapter after the site's choice."""
    assert isinstance(method, Choosing)
    attached = method.attach(model, PLACES, start)
    method.choose(attached, PLACES, batch)
    assert all(parameter.grad is None for parameter in attached.parameters())
    return method.state(attached, PLACES)


def gradient(model: Any, batch: Batch) -> torch.Tensor:
    """Of the loss, in the weights of the map."""
    weight = model.get_parameter(f"model.layers.{MAP}.weight")
    modality.loss(model.eval(), batch).backward()  # type: ignore[no-untyped-call]
    return weight.grad.flatten()


def moved(start: Adapter, count: int) -> Adapter:
    """The adapter after `count` entries of each map have changed, the later the more."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(tensor)).sub(len(tensor) - count - 1).clamp(min=0) * 0.01

    return {key: change(tensor) if key.endswith(".change") else tensor for key, tensor in start.items()}


@pytest.mark.parametrize("name", NAMES)
def test_first_the_entries_of_the_largest_gradient_grow_from_zero(name: str, tiny: Any, text: list[Batch]) -> None:
    method = make(name, {"share": 0.03})
    adapter = grown(method, tiny(), method.start(tiny(), PLACES, seed=0), text[0])
    expected = gradient(tiny(), text[0]).abs()
    count = round(0.03 * len(expected))
    assert torch.equal(adapter[f"{MAP}.index"].long(), expected.topk(count).indices.sort().values)
    assert not any(tensor.any() for key, tensor in adapter.items() if key.endswith(".change"))


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_the_same_each_time_and_another_of_another_text(name: str, tiny: Any, text: list[Batch]) -> None:
    method = make(name, {"share": 0.03})
    start = method.start(tiny(), PLACES, seed=0)
    runs = ((tiny(), text[0]), (tiny().train(), text[0]), (tiny(), text[1]))
    one, again, other = (grown(method, model, start, batch) for model, batch in runs)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one if key.endswith(".index"))


def test_later_the_part_that_is_renewed_goes_and_what_has_changed_most_stays(tiny: Any, text: list[Batch]) -> None:
    method = make("spiel", {"share": 0.03, "renewed": 0.25})
    start = moved(method.start(tiny(), PLACES, seed=0), count=10_000)
    adapter = grown(method, tiny(), start, text[0])
    for key in (key for key in start if key.endswith(".index")):
        before, after = (
            dict(zip(one[key].tolist(), one[key[:-5] + "change"].tolist(), strict=True)) for one in (start, adapter)
        )
        assert len(after) == len(before) == len(start[key]) and adapter[key].tolist() == sorted(after)
        stays = list(before)[round(0.25 * len(before)) :]  # the later, the more they have changed
        assert all(after[at] == before[at] for at in stays)
        assert all(after[at] == before.get(at, 0.0) for at in after)
    assert not torch.equal(adapter[f"{MAP}.index"], start[f"{MAP}.index"])


def test_what_has_not_changed_goes_first_whatever_the_part(tiny: Any, text: list[Batch]) -> None:
    method = make("spiel", {"share": 0.03, "renewed": 0.0})
    start = moved(method.start(tiny(), PLACES, seed=0), count=5)
    adapter = grown(method, tiny(), start, text[0])
    assert set(start[f"{MAP}.index"][-5:].tolist()) <= set(adapter[f"{MAP}.index"].tolist())
    assert int(adapter[f"{MAP}.change"].count_nonzero()) == 5
    whole = moved(start, count=10_000)
    after = grown(method, tiny(), whole, text[0])
    assert all(torch.equal(whole[key], after[key]) for key in whole), "nothing is renewed then"


def test_the_index_of_lt_sft_is_that_of_the_first_round(tiny: Any, text: list[Batch]) -> None:
    method = make("lt-sft", {"share": 0.03})
    start = moved(method.start(tiny(), PLACES, seed=0), count=1)
    after = grown(method, tiny(), start, text[0])
    assert all(torch.equal(start[key], after[key]) for key in start)


@pytest.mark.parametrize("name", NAMES)
def test_a_start_is_spread_over_the_matrix_and_drawn_for_each_map_alone(name: str, tiny: Any) -> None:
    method = make(name, {"share": 0.3})
    start = method.start(tiny(), PLACES, seed=0)
    for key in (key for key in start if key.endswith(".index")):
        d_out, d_in = start[f"{key[:-6]}.size"].tolist()
        bounds = torch.arange(len(start[key]) + 1) * d_out * d_in // len(start[key])
        assert bool(((start[key] >= bounds[:-1]) & (start[key] < bounds[1:])).all())
    other = method.start(tiny(), {4: 4}, seed=0)
    assert all(torch.equal(start[key], tensor) for key, tensor in other.items()), "whichever other layers train"
    assert not torch.equal(start[f"{MAP}.index"], start[f"{MAP}.index".replace("0", "4", 1)])
    whole = make(name, {"share": 1.0}).start(tiny(), PLACES, seed=0)
    assert torch.equal(whole[f"{MAP}.index"], torch.arange(len(whole[f"{MAP}.index"]), dtype=torch.int32))


def test_a_part_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="renewed is a part of the entries that train, 0 to 1; got 1.5"):
        make("spiel", {"renewed": 1.5})
    with pytest.raises(ValueError, match="share is a part of each map's entries"):
        make("spiel", {"share": 0.0})
