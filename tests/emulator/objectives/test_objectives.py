"""Objectives that compare answers: their rows, their closed forms, and that they teach what they say."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator import methods, modality, objectives
from offsite.emulator.examples import Source, collect
from offsite.emulator.tuning.adapting import adapt, adapted
from offsite.protos.spec import Choice, LocalTraining

PLACES = {1: 1, 4: 4}
WORDS = torch.randint(3, 90, (16, 12), generator=torch.Generator().manual_seed(2)).tolist()
TEXTS = [[" ".join(f"w{number}" for number in part) for part in (row[:4], row[4:7], row[7:])] for row in WORDS]
ROWS: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in TEXTS],
    "kto": [
        {"prompt": prompt, "completion": answer, "label": bool(label)}
        for prompt, good, bad in TEXTS
        for answer, label in ((good, 1), (bad, 0))
    ],
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str, path: Path, rows: list[Any]) -> Any:
    return collect(
        written(path, rows), objectives.make(name, {}).reader(modality.default()), odd_rows="refuse"
    ).examples


@pytest.fixture
def encoded(tokenizer: Any, tmp_path: Path) -> Any:
    def encode(name: str, rows: list[Any] | None = None, max_length: int = 24) -> list[Any]:
        examples = read(name, tmp_path / "rows.jsonl", rows or ROWS[name])
        objective = objectives.make(name, {})
        given = {"max_length": max_length, "odd_rows": "refuse"}
        return list(objective.encode(modality.default(), examples, tokenizer, **given).samples)

    return encode


def log_likelihood(model: nn.Module, sample: Any) -> Tensor:
    """The sum over the answer's tokens, as anybody would write it for one sequence."""
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor(sample.labels)
    logs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
    return sum(logs[at, label] for at, label in enumerate(labels[1:]) if label >= 0)  # type: ignore[return-value]


def moved(tiny: Any) -> Any:
    """A model whose adapter has changed something, and the model without it."""
    model, method, bare = tiny(), methods.make("lora", {"rank": 2}), tiny()
    attached = method.attach(model, PLACES, method.start(model, PLACES, seed=0))
    with torch.no_grad():
        for at, parameter in enumerate(method.named_parameters(attached, PLACES).values()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)))
    return attached.eval(), bare.eval()


def test_dpo_is_its_closed_form(tiny: Any, encoded: Any) -> None:
    model, bare = moved(tiny)
    objective, samples = objectives.make("dpo", {"beta": 0.3}), encoded("dpo")[:5]
    batch = objective.collate(objective.refer(bare, samples, batch_size=3))
    value = objective.loss(model, batch)
    terms = []
    for one in samples:
        gains = [log_likelihood(model, side) - log_likelihood(bare, side) for side in (one.own, one.other)]
        terms.append(-torch.nn.functional.logsigmoid(0.3 * (gains[0] - gains[1])))
    expected = float(torch.stack(terms).mean().detach())
    assert float(value.detach()) == pytest.approx(expected, abs=1e-6) and abs(expected - math.log(2)) > 1e-2
    value.backward()  # type: ignore[no-untyped-call]


def test_kto_is_its_closed_form(tiny: Any, encoded: Any) -> None:
    model, bare = moved(tiny)
    objective = objectives.make("kto", {"beta": 0.2, "desirable": 1.5, "undesirable": 0.5})
    samples = encoded("kto")[:6]
    batch = objective.collate(objective.refer(bare, samples, batch_size=4))
    own, other = (
        torch.stack([log_likelihood(model, side) - log_likelihood(bare, side) for side in sides]).detach()
        for sides in ([one.own for one in samples], [one.other for one in samples])
    )
    z = max(0.0, float(other.mean()))
    desired, undesired = 1.5 * (1 - torch.sigmoid(0.2 * (own - z))), 0.5 * (1 - torch.sigmoid(0.2 * (z - own)))
    marks = torch.tensor([one.desirable for one in samples])
    expected = float(torch.where(marks, desired, undesired).mean())
    common = objective.common(model, batch)
    assert common is not None and float(common) == pytest.approx(float(other.mean()), abs=1e-5)
    assert float(objective.loss(model, batch, float(common)).detach()) == pytest.approx(expected, abs=1e-6)
    assert batch.targets == batch.member(0).targets < batch.rows.targets and batch.terms == 6


@pytest.mark.parametrize(("name", "first"), [("dpo", math.log(2)), ("kto", 0.5)])
def test_training_begins_where_nothing_is_known_and_pulls_the_answers_apart(
    tiny: Any, encoded: Any, name: str, first: float
) -> None:
    rules = LocalTraining(
        steps=20, batch_size=8, learning_rate=1e-2, objective=Choice(name=name, settings={"beta": 0.5})
    )
    model, method, samples = tiny(), methods.make("lora", {"rank": 2}), encoded(name)
    attached = method.attach(model, PLACES, method.start(model, PLACES, seed=0))
    known = objectives.make(name, {}).refer(attached, samples, batch_size=8)
    losses: list[float] = []
    adapt(
        attached, method.named_parameters(attached, PLACES), samples, rules, tell=lambda *told: losses.append(told[-1])
    )
    assert losses[0] == pytest.approx(first, abs=1e-5) and sum(losses[-3:]) < sum(losses[:3]) - 0.05
    after = objectives.make(name, {}).refer(attached, samples, batch_size=8)
    gains = [new.reference[0] - old.reference[0] for new, old in zip(after, known, strict=True)]
    if name == "dpo":
        against = [new.reference[1] - old.reference[1] for new, old in zip(after, known, strict=True)]
    else:
        against = [gain for gain, one in zip(gains, samples, strict=True) if not one.desirable]
        gains = [gain for gain, one in zip(gains, samples, strict=True) if one.desirable]
    assert sum(gains) / len(gains) > sum(against) / len(against) + 0.5


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_shares_of_several_processes_are_the_loss_of_the_batch(tiny: Any, encoded: Any, name: str) -> None:
    model, bare = moved(tiny)
    objective = objectives.make(name, {})
    batch = objective.collate(objective.refer(bare, encoded(name)[:5], batch_size=8))
    parts = [batch.share(rank, 2) for rank in range(2)]
    assert [part.terms for part in parts] == [3, 2] and sum(part.targets for part in parts) == batch.targets
    common, *owns = (objective.common(model, one) for one in (batch, *parts))
    assert (common is None) == (name == "dpo")
    of_all = 0.0 if common is None else float(common)
    whole = float(objective.loss(model, batch, of_all).detach())
    shares = [float(objective.loss(model, part, of_all).detach()) * part.terms / 5 for part in parts]
    assert sum(shares) == pytest.approx(whole, rel=1e-5)
    if common is not None:
        weighted = sum(float(own) * part.terms / 5 for own, part in zip(owns, parts, strict=True))
        assert weighted == pytest.approx(of_all, rel=1e-4)
    again = objective.collate(batch.samples)
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in batch.tensors.items())


def test_turns_are_the_rows_that_texts_are(encoded: Any) -> None:
    question, good, bad = turn("user", "w1 w2"), turn("assistant", "w3 w4"), turn("assistant", "w5")
    explicit = {"prompt": [question], "chosen": [good], "rejected": [bad]}
    whole = {"chosen": [question, good], "rejected": [question, bad]}
    text = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}
    one, other, plain = (encoded("dpo", [row])[0] for row in (explicit, whole, text))
    assert one == other and one.own != one.other
    assert [sum(label >= 0 for label in side.labels) for side in (plain.own, plain.other)] == [3, 2]  # and the end
    labelled = [
        {"prompt": [question], "completion": [good], "label": 1},
        {"prompt": "w9", "completion": "w8", "label": "false"},
    ]
    assert [sample.desirable for sample in encoded("kto", labelled)] == [True, False]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        (
            "dpo",
            {"text": "w1"},
            r"found the columns \['text'\]; expected for the objective dpo .\"prompt\", \"chosen\"",
        ),
        ("dpo", {"chosen": "w1", "rejected": "w2"}, "expected for the objective dpo"),
        ("dpo", {"prompt": "w1", "chosen": "w2", "rejected": "w2"}, "are the same"),
        ("dpo", {"prompt": "w1", "chosen": "w2", "rejected": ""}, "of 'chosen' and 'rejected', .* is empty"),
        ("dpo", {"chosen": [turn("user", "w1")], "rejected": [turn("user", "w2")]}, "begin with the same question"),
        (
            "kto",
            {"prompt": "w1", "completion": "w2"},
            'expected for the objective kto ."prompt", "completion", "label"',
        ),
        ("kto", {"prompt": "w1", "completion": "w2", "label": "good"}, "'label' must be true or false, found 'good'"),
        ("supervised", {"prompt": "w1", "chosen": "w2", "rejected": "w3"}, 'expected ."text"'),
    ],
)
def test_a_row_of_another_shape_is_named_with_the_objective_and_what_it_expects(
    tmp_path: Path, name: str, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"line 1: .*{words}"):
        read(name, tmp_path / "rows.jsonl", [row])


def test_examples_say_their_rows_and_a_survey_finds_for_what_they_are(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        examples = read(name, tmp_path / f"{name}.jsonl", rows)
        assert read(name, tmp_path / "again.jsonl", [one.row for one in examples]) == examples
        assert all(one.characters > 10 and one.place for one in examples)
        assert objectives.survey(Source(tmp_path / f"{name}.jsonl"))[0].name == name
    mixed = written(tmp_path / "mixed.jsonl", [*ROWS["kto"], {"text": "w1"}])
    assert objectives.survey(Source(mixed))[0].name == "supervised", "answers with a verdict can be learned, too"
    with pytest.raises(ValueError, match='expected {"text"}'):
        objectives.survey(Source(written(tmp_path / "odd.jsonl", [{"other": 1}])))


@pytest.mark.parametrize("odd_rows", ["skip", "refuse"])
def test_rows_of_another_objective_are_refused_with_its_name(tmp_path: Path, odd_rows: Any) -> None:
    pairs, texts = (
        written(tmp_path / "dpo.jsonl", ROWS["dpo"]),
        written(tmp_path / "texts.jsonl", [{"text": "w1"}]),
    )
    nothing = written(tmp_path / "odd.jsonl", [{"other": 1}])
    for asked, path, others in (("supervised", pairs, "dpo"), ("kto", pairs, "dpo"), ("dpo", texts, "supervised")):
        words = f"expected .*; the run's objective is {asked}, and the rows are for {others}: ask for a run with that"
        with pytest.raises(ValueError, match=words):
            objectives.read(objectives.make(asked, {}), Source(path, odd_rows=odd_rows))
    with pytest.raises(ValueError, match="^((?!the run's objective).)*$"):
        objectives.read(objectives.make("dpo", {}), Source(nothing, odd_rows=odd_rows))


def test_what_is_cut_until_nothing_is_left_is_dropped_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    long = {"prompt": "w1 " * 30, "chosen": "w2", "rejected": "w3"}
    examples = read("dpo", tmp_path / "rows.jsonl", [ROWS["dpo"][0], long])
    objective = objectives.make("dpo", {})
    encoding = objective.encode(modality.default(), examples, tokenizer, max_length=16, odd_rows="skip")
    assert (encoding.counts["sequences"], encoding.counts["without_target"]) == (1, 1)
    assert "1 of 2 comparisons" in encoding.warnings[0]
    with pytest.raises(ValueError, match="none of the 1 examples has two answers to learn from within 16 tokens"):
        objective.encode(modality.default(), examples[1:], tokenizer, max_length=16, odd_rows="skip")


def test_samples_of_another_objective_and_answers_that_are_all_the_same_are_refused(
    tiny: Any, encoded: Any, text: Any
) -> None:
    rules = LocalTraining(steps=1, batch_size=2, learning_rate=1e-2, objective=Choice(name="dpo"))
    with pytest.raises(
        ValueError, match="the objective dpo trains on answers that are compared, and these .* are text"
    ):
        adapted(tiny(), methods.make("lora", {}), PLACES, text[0].samples, rules)
    with pytest.raises(ValueError, match="all answers are the same"):
        encoded("kto", [replace_answer(row) for row in ROWS["kto"][:2]])
    with pytest.raises(ValueError, match="has no reference"):
        objectives.make("dpo", {}).collate([replace(encoded("dpo")[0], reference=None)])


def test_an_answer_is_beside_the_next_other_one(encoded: Any) -> None:
    rows = [
        {"prompt": f"w{at}", "completion": f"w{word}", "label": True} for at, word in enumerate((7, 7, 8, 9, 7), 10)
    ]
    samples = encoded("kto", rows)
    beside = [[label for label in one.other.labels if label >= 0] for one in samples]
    own = [[label for label in one.own.labels if label >= 0] for one in samples]
    assert beside == [own[2], own[2], own[3], own[4], own[2]]


def replace_answer(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"completion": "w7"}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [("dpo", {"beta": 0.0}, "beta must be above 0"), ("kto", {"desirable": 0.0}, "desirable and undesirable must be")],
)
def test_a_setting_that_makes_no_sense_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objectives.make(name, settings)
