import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.emulator import zoo
from offsite.emulator.evaluation.accuracy import Accuracy, accuracy
from offsite.emulator.methods import make
from offsite.emulator.precision import DTYPES, fastest
from offsite.emulator.zoo import tasks
from offsite.emulator.zoo.tasks import LocalTask

QUESTIONS = [
    {"question": "w3 {{w4}} w5", "choices": ["w6", "w7 w8", "w9 w10 w11"], "answer": 0},
    {"question": "w12 w13", "choices": ["w14 w15", "w16", "w17"], "answer": 1},
    {"question": "w18", "choices": ["w19", "w20 w21 w22"], "answer": 1},
    {"question": "w23 w24", "choices": ["w25", "w26", "w27", "w28 w29"], "answer": 3},
    {"question": "w30", "choices": ["w31 w32", "w33"], "answer": 0},
]


@pytest.fixture
def task(tmp_path: Path) -> LocalTask:
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return LocalTask("words", file)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address can be looked up and no connection made."""

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> list[tuple[bool, bool]]:
    """Whether each question is answered right, by the sum of log-likelihoods and by that over the length."""
    right = []
    for question in questions:
        context = f"Question: {question['question']}\nAnswer:"
        sums, means = [], []
        for choice in question["choices"]:
            ids: Tensor = tokenizer(f"{context} {choice}", return_tensors="pt").input_ids
            start = len(tokenizer(context).input_ids)
            log = model(ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
            sums.append(float(log.gather(1, ids[0, start:, None]).sum()))
            means.append(sums[-1] / len(choice))
        answer = question["answer"]
        right.append((sums.index(max(sums)) == answer, means.index(max(means)) == answer))
    return right


def expected(right: list[tuple[bool, bool]]) -> Accuracy:
    n = len(right)
    shares = [sum(column) / n for column in zip(*right, strict=True)]
    errors = [math.sqrt(share * (1 - share) / (n - 1)) for share in shares]
    return Accuracy(shares[0], pytest.approx(errors[0]), shares[1], pytest.approx(errors[1]), n)


def test_answers_are_those_of_likelihoods_by_hand(
    tiny: Any, tokenizer: Any, task: LocalTask, offline: None, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama", 2).train()
    tokenizer.pad_token = None
    right = by_hand(model, tokenizer, QUESTIONS)
    assert 0 < sum(sums for sums, _ in right) < len(right) and 0 < sum(means for _, means in right) < len(right)
    assert [sums for sums, _ in right] != [means for _, means in right]  # or one could stand for the other
    assert accuracy(model, tokenizer, [task], batch_size=4) == {"words": expected(right)}
    assert model.training and tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")


def test_a_limit_takes_the_first_questions_of_each_task(
    tiny: Any, tokenizer: Any, task: LocalTask, offline: None
) -> None:
    model, again = tiny("llama", 2), LocalTask("again", task.file)
    found = accuracy(model, tokenizer, [task, again], limit=3, batch_size=2)
    assert list(found) == ["words", "again"]
    assert found["words"] == found["again"] == expected(by_hand(model, tokenizer, QUESTIONS[:3]))


def test_an_attached_model_is_asked_with_its_adapter(tiny: Any, tokenizer: Any, task: LocalTask) -> None:
    model, method = tiny("gpt2", 2), make("lora", {})
    torch.manual_seed(0)
    adapter = {key: torch.randn_like(value) for key, value in method.start(model, {0: 0, 1: 1}, seed=0).items()}
    before = by_hand(model, tokenizer, QUESTIONS)
    attached = method.attach(model, {0: 0, 1: 1}, adapter)
    right = by_hand(attached, tokenizer, QUESTIONS)
    assert right != before
    assert accuracy(attached, tokenizer, [task])["words"] == expected(right)


def test_tasks_need_names_of_their_own(tiny: Any, tokenizer: Any, task: LocalTask) -> None:
    with pytest.raises(ValueError, match="names of their own, got words, words"):
        accuracy(tiny("llama", 2), tokenizer, [task, task])


def test_without_the_harness_one_is_told_what_to_install(
    tiny: Any, tokenizer: Any, task: LocalTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ValueError, match=r"pip install 'offsite\[evaluation\]'"):
        accuracy(tiny("llama", 2), tokenizer, [task])


@pytest.mark.slow
@pytest.mark.long
def test_smollm2_answers_piqa_as_well_as_is_known() -> None:
    cache = zoo.cache_folder()
    model, tokenizer = zoo.load_base(
        zoo.locate("smollm2-135m-instruct", cache=cache), DTYPES[fastest(torch.device("cpu"))]
    )
    found = accuracy(model, tokenizer, [tasks.locate("piqa", cache=cache)], limit=60)["piqa"]
    assert found.n == 60
    assert found.accuracy == pytest.approx(0.70, abs=0.12)  # twice the standard error of 60 questions
    assert found.normalised == pytest.approx(0.65, abs=0.12)
