"""What every modality owes, run over the family's own mapping: from rows of a file to a step of training and scores."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import nn

from offsite.client.site.engines import ENGINES, Ranks
from offsite.client.site.job import EngineSpec
from offsite.emulator import modality
from offsite.emulator.batches import evaluation_batches, longest, training_batches
from offsite.emulator.examples import Example, collect
from offsite.emulator.modality import MODALITIES, Batch, Modality, Sample, Score, collate, loss, run, score
from offsite.protos.spec import LocalTraining

LENGTH = 24  # of a sample at most
NUMBERS = torch.randint(3, 90, (12, 20), generator=torch.Generator().manual_seed(7)).tolist()
TEXTS = [[f"w{number}" for number in row] for row in NUMBERS]
ROWS: dict[str, list[dict[str, Any]]] = {
    "causal-text": [
        {"prompt": " ".join(row[:5]), "completion": " ".join(row[5 : 8 + at])} for at, row in enumerate(TEXTS)
    ],
    "series": [{"series": [number / 90 for number in row[: 8 + at]]} for at, row in enumerate(NUMBERS)],
}
MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "causal-text": lambda tiny: tiny("gpt2"),  # it has dropout
    "series": lambda _: importlib.import_module("offsite_series").Forecaster(),
}


@dataclass
class Case:
    """A modality, rows of it, a model, and what the modality makes of the rows."""

    kind: Modality
    rows: list[dict[str, Any]]
    model: Any
    tokenizer: Any
    examples: list[Example]
    samples: list[Sample]
    batches: list[Batch]  # of unequal sizes


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=sorted(MODALITIES))
def case(request: pytest.FixtureRequest, tiny: Any, tokenizer: Any, tmp_path: Path) -> Case:
    name = request.param
    if name not in ROWS:
        pytest.skip(f"this suite has no rows of {name}")
    kind, rows = MODALITIES.make(name, {}), ROWS[name]
    examples = collect(written(tmp_path / "rows.jsonl", rows), kind, odd_rows="refuse").examples
    samples = kind.encode(examples, tokenizer, max_length=LENGTH, odd_rows="refuse").samples
    torch.manual_seed(0)
    batches = evaluation_batches(samples, batch_size=5)
    return Case(kind, rows, MODELS[name](tiny), tokenizer, examples, samples, batches)


def test_an_example_says_its_row_and_its_place(case: Case, tmp_path: Path) -> None:
    assert len(case.examples) == len(case.rows)
    assert all(one.place == f"{tmp_path / 'rows.jsonl'}, line {at}" for at, one in enumerate(case.examples, 1))
    again = collect(written(tmp_path / "again.jsonl", [one.row for one in case.examples]), case.kind).examples
    assert again == case.examples and list(map(repr, again)) == list(map(repr, case.examples))
    assert all(one.characters > 0 for one in again) and len({repr(one) for one in again}) == len(again)


def test_of_parquet_no_column_is_read_that_does_not_matter(case: Case, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([row | {"other": at} for at, row in enumerate(case.rows)])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert collect(tmp_path / "a.parquet", case.kind).examples == case.examples
    assert set(case.rows[0]) <= set(case.kind.columns) and "other" not in case.kind.columns


def test_a_row_of_no_shape_is_named_with_what_was_expected_or_left_out(case: Case, tmp_path: Path) -> None:
    for odd in ({"no such column": 1}, {column: [{}] for column in case.kind.columns}, 3):
        path = written(tmp_path / "odd.jsonl", [case.rows[0], odd])
        with pytest.raises(ValueError, match="line 2: ") as refusal:
            collect(path, case.kind, odd_rows="refuse")
        census = collect(path, case.kind).census
        assert (census.examples, [one.first for one in census.left_out]) == (1, [str(refusal.value)])
    assert case.kind.shapes in str(refusal.value)


def test_samples_bear_its_name_and_are_no_longer_than_is_asked(case: Case) -> None:
    for length in (10, LENGTH):
        encoding = case.kind.encode(case.examples, case.tokenizer, max_length=length, odd_rows="skip")
        assert encoding.samples and all(1 < len(one) <= length for one in encoding.samples)
        assert encoding.counts["left_out"] == 0 and encoding.warnings == [] or length < LENGTH
    assert {one.modality for one in case.samples} == {case.kind.name}
    assert len(set(case.samples)) == len({repr(one) for one in case.samples}) == len(case.rows)
    with pytest.raises(ValueError, match="none of the 12 "):
        case.kind.encode(case.examples, case.tokenizer, max_length=1, odd_rows="skip")


def test_a_batch_says_what_it_was_collated_of(case: Case) -> None:
    batch = collate(case.samples)
    again = collate(batch.samples)
    assert batch.modality == case.kind.name
    assert batch.mask.sum(dim=1).tolist() == list(map(len, case.samples)) == list(map(len, batch.samples))
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in batch.tensors.items())
    sizes = [len(one) for one in longest(case.batches, 3)[0].samples]
    assert sizes == sorted(map(len, case.samples))[-3:]


def test_rounds_see_one_endless_sequence(case: Case) -> None:
    def seen(first: int, steps: int) -> list[Any]:
        batches = training_batches(case.samples, batch_size=5, steps=steps, first_step=first, seed=3)
        return [batch.samples for batch in batches]

    assert seen(0, 2) + seen(2, 3) == seen(0, 5)


def test_shares_of_several_processes_are_the_batch(case: Case) -> None:
    batch = case.batches[0]
    shares = [batch.share(rank, 2) for rank in range(2)]
    assert [len(share.mask) for share in shares] == [3, 2]
    whole = score(case.model, [batch])
    parts = score(case.model, shares)
    assert parts.count == whole.count and parts.total == pytest.approx(whole.total, rel=1e-5)


def test_a_probe_is_always_the_same_and_can_be_learned(case: Case) -> None:
    one, again = (case.kind.probe(case.model, rows=2, length=6) for _ in range(2))
    assert one.mask.shape == (2, 6) and one.targets == 10
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in one.tensors.items())
    assert bool(loss(case.model, one).isfinite())


def test_a_disturbed_batch_differs_around_what_is_kept(case: Case) -> None:
    batch = case.batches[-1]
    other, kept = modality.disturb(case.model, batch)
    assert torch.equal(other.mask, batch.mask) and bool(kept.any())
    assert not bool((kept & (batch.mask == 0)).any()) and not bool((kept[:, 1:] & kept[:, :-1]).any())
    assert score(case.model, [other]).total != score(case.model, [batch]).total


def test_batches_are_scored_in_its_metric(case: Case) -> None:
    whole = score(case.model, case.batches)
    assert whole.metric == case.kind.metric and whole.count == sum(batch.targets for batch in case.batches)


def test_scores_of_parts_are_that_of_the_whole(case: Case) -> None:
    parts, whole = [score(case.model, [batch]) for batch in case.batches], score(case.model, case.batches)
    assert len(parts) > 1 and reduce(add, parts) == whole
    assert (whole.total, whole.count) == (sum(one.total for one in parts), sum(one.count for one in parts))


def test_the_loss_is_the_mean_score_and_differentiable(case: Case) -> None:
    for batch in case.batches:
        value = loss(case.model, batch)
        assert float(value.detach()) == pytest.approx(score(case.model, [batch]).mean, rel=1e-5)
    value.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in case.model.parameters())


def test_outputs_that_are_not_kept_change_nothing_in_those_that_are(case: Case) -> None:
    batch = case.batches[0]
    with torch.no_grad():
        every = run(case.model, batch)
        for keep in (torch.tensor([0, every.shape[1] - 1]), batch.last):
            torch.testing.assert_close(run(case.model, batch, keep=keep), every[:, keep])


def test_scoring_leaves_the_mode_and_no_gradient(case: Case) -> None:
    expected = score(case.model, case.batches)
    assert score(case.model.train(), case.batches) == expected and case.model.training
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_an_engine_trains_on_it(case: Case) -> None:
    training = LocalTraining(steps=1, batch_size=5, learning_rate=1e-3)
    plain = EngineSpec(name="plain")
    trained = dict(case.model.named_parameters())
    engine = ENGINES[plain.name](case.model, trained, training, plain, Ranks(0, 1, torch.device("cpu")))
    (batch,) = training_batches(case.samples, batch_size=5, steps=1, first_step=0, seed=0)
    before = score(case.model, [batch])
    assert engine.step(batch) == pytest.approx(before.mean, rel=1e-5)
    assert score(case.model, [batch]).total < before.total


def test_there_is_no_score_of_nothing_and_no_sum_of_two_metrics(case: Case) -> None:
    with pytest.raises(ValueError, match="no batch was given"):
        score(case.model, [])
    with pytest.raises(ValueError, match=f"in {case.kind.metric} and one in errors do not add up"):
        Score(1.0, 2, case.kind.metric) + Score(1.0, 2, "errors")
