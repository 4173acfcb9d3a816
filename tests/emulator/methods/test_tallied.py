"""What tells tasks apart is counted by row, adds over sites bit by bit, and is of what it says."""

import copy
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation.base import Origin, Version
from offsite.emulator.methods import make
from offsite.emulator.modality import Batch, collate
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens
from offsite.emulator.routing import Telling

NAMES = ("signature", "prototype")
PLACES = {0: 0, 1: 1}


def measured(name: str, base: Any, batches: list[Batch]) -> Any:
    method: Any = make(name, {})
    model = method.attach(copy.deepcopy(base), PLACES, method.start(base, PLACES, seed=0))
    losses = [method.measure(model, PLACES, batch) for batch in batches]
    assert all(loss > 0 for loss in losses)
    return method.state(model, PLACES)


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_of_two_sites_is_that_of_their_rows_together(name: str, tiny: Any, text: list[Batch]) -> None:
    base, method = tiny(layers=2), make(name, {})
    zeros = method.start(base, PLACES, seed=0)
    one, other = measured(name, base, text[:1]), measured(name, base, text[1:])
    rows = [sample for batch in text for sample in batch.samples]
    together = measured(name, base, text[::-1])
    assert all(bool(tensor.any()) and torch.equal(tensor, tensor.round()) for tensor in together.values())
    assert together[f"0.{name}.count"].item() == len(rows)
    for first, second in ((one, other), (other, one)):
        fold = aggregation.make("sum", {}).begin(Version(zeros, {"": zeros}), method.schema(zeros))
        for update in (first, second):
            fold.add(update, Origin("a" if update is one else "b", "", 0.5))
        final = fold.finish([""]).adapter
        assert final.keys() == together.keys()
        assert all(torch.equal(final[key], tensor) for key, tensor in together.items())


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_is_added_and_need_no_target(name: str, tiny: Any, text: list[Batch]) -> None:
    base, method = tiny(layers=2), make(name, {})
    asked = collate([Tokens(one.input_ids, (IGNORED,) * len(one)) for one in text[0].samples])
    with pytest.raises(ValueError, match="no token to predict"):
        measured(name, base, [asked])
    assert isinstance(method, Telling)
    rows = method.rows(base, PLACES, asked)
    prompts = collate([Tokens(one.input_ids, one.input_ids) for one in text[0].samples])
    assert {len(tensor) for tensor in rows.values()} == {len(asked.samples)}
    parts = method.parts(measured(name, base, [prompts]))
    assert all(torch.equal(rows[part].double().sum(dim=0), total) for part, total in parts.items())


def test_a_signature_is_of_prompts_and_of_all_of_a_row_without_one() -> None:
    method: Any = make("signature", {"ngram": 1})
    asked, plain = Tokens((4, 5, 6, 7), (IGNORED, IGNORED, 6, 7)), Tokens((4, 5, 6, 7), (IGNORED, 5, 6, 7))
    rows = method.counts(collate([asked, plain]))
    assert rows["terms"].sum(dim=1).tolist() == [2, 4]
    assert rows["documents"].sum(dim=1).tolist() == [2, 4] and rows["count"].tolist() == [[1], [1]]
    again = method.counts(collate([Tokens((4, 4, 6), (IGNORED, IGNORED, 6))]))
    assert (again["terms"].sum(), again["documents"].sum()) == (2, 1)


def test_a_prototype_does_not_see_padding_and_differs_by_salt(tiny: Any, text: list[Batch]) -> None:
    base, method = tiny(layers=2), make("prototype", {})
    short, long = text[0].samples[0], text[-1].samples[-1]
    assert len(short) < len(long) and isinstance(method, Telling)
    alone, padded = (method.rows(base, PLACES, collate(rows))["bundle"][0] for rows in ([short], [short, long]))
    assert float((alone != padded).float().mean()) < 0.01  # what rounding turns round
    salted: Any = make("prototype", {"salt": 1})
    assert float((alone != salted.rows(base, PLACES, collate([short]))["bundle"][0]).float().mean()) > 0.3


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("signature", {"ngram": 0}, "ngram must be from 1 to 8"),
        ("signature", {"buckets": 8}, "buckets must be from 16"),
        ("signature", {"salt": "é" * 33}, "salt must be at most 64 bytes, got 66"),
        ("prototype", {"size": 8}, "size must be from 64"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(name, settings)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_other_settings_or_of_another_layer_are_refused(name: str, tiny: Any) -> None:
    base, method = tiny(layers=2), make(name, {})
    start = method.start(base, PLACES, seed=0)
    with pytest.raises(ValueError, match=f"sums of {name} are '<layer>.{name}.<part>', of .*count"):
        method.schema({key: tensor[:1] for key, tensor in start.items()})
    with pytest.raises(ValueError, match=f"sums of {name} are"):
        method.schema({})
    with pytest.raises(ValueError, match="the sums are at layer 0, but the lowest that trains is 1"):
        method.attach(base, {1: 1}, start)
