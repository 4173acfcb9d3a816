"""Instructions in other words are known by their task, a new task is known to be new, and drift is seen."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from offsite.emulator import routing
from offsite.emulator.methods import make
from offsite.emulator.methods.base import Adapter
from offsite.emulator.modality import Batch, collate
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens

PLACES = {0: 0, 1: 1}
# Of each task: how it may be asked for, and what it is asked of. {} is the second.
TASKS: dict[str, tuple[list[str], list[str]]] = {
    "translate": (
        [
            "translate the following sentence into french : {}",
            "please give the french translation of this sentence : {}",
            "how would one say this in french ? {}",
            "write this sentence in french : {}",
            "what is the french translation of : {}",
            "render the sentence below in french . {}",
        ],
        ["the train is late", "where is the station", "we have two cats", "it rains in may", "open the window"],
    ),
    "summarise": (
        [
            "summarise the following article in one paragraph : {}",
            "write a short summary of this article : {}",
            "what are the main points of the article below ? {}",
            "give a brief summary of the following text . {}",
            "condense this article to its main points : {}",
            "in a few words , what does this article say ? {}",
        ],
        ["the council met on monday", "prices rose again", "a new bridge is planned", "the team won", "rain is rare"],
    ),
    "sentiment": (
        [
            "is the sentiment of this review positive or negative ? {}",
            "classify the review below as positive or negative : {}",
            "does the customer like the product ? answer positive or negative . {}",
            "tell whether the following review is positive : {}",
            "what sentiment does this customer review have ? {}",
            "label the sentiment of the review : {}",
        ],
        ["it broke after a day", "i love it", "works as it should", "never again", "my friends want one , too"],
    ),
    "code": (
        [
            "write a python function that does this : {}",
            "implement the following in python : {}",
            "complete the python function below . {}",
            "give python code for a function : {}",
            "fix the bug in this python function : {}",
            "what does this python code return ? {}",
        ],
        ["sort a list of numbers", "count the words of a file", "reverse a string", "add two vectors", "find a prime"],
    ),
}
OTHER = [
    f"at which temperature does {metal} melt , in degrees ?"
    for metal in ("iron", "zinc", "lead", "tin", "gold", "copper")
]
WORDS: dict[str, int] = {}


def asked(texts: Iterable[str]) -> Batch:
    """Return requests as tokens, a number for each word, and an answer that says nothing of the task."""
    ids = [tuple(3 + WORDS.setdefault(word, len(WORDS)) for word in text.split()) for text in texts]
    return collate([Tokens((*row, 1, 2), (*[IGNORED] * len(row), 1, 2)) for row in ids])


def texts(task: str, ways: slice) -> list[str]:
    forms, contents = TASKS[task]
    return [form.format(content) for form in forms[ways] for content in contents]


def summed(method: Any, rows: Batch, model: Any = None) -> Adapter:
    parts = method.rows(model, PLACES, rows)
    return {f"0.{method.name}.{part}": tensor.double().sum(dim=0) for part, tensor in parts.items()}


@pytest.fixture(scope="module")
def signature() -> Any:
    return make("signature", {"salt": "spring"})


@pytest.fixture(scope="module")
def books(signature: Any) -> dict[str, Adapter]:
    return {task: summed(signature, asked(texts(task, slice(3)))) for task in TASKS}


def test_instructions_in_other_words_are_known_by_their_task(signature: Any, books: dict[str, Adapter]) -> None:
    right = [
        guess == task
        for task in TASKS
        for guess in routing.route(signature, torch.nn.Identity(), PLACES, asked(texts(task, slice(3, None))), books)
    ]
    assert len(right) == 60 and sum(right) >= 0.95 * len(right)


def test_a_known_task_is_told_from_a_new_one(signature: Any, books: dict[str, Adapter]) -> None:
    for task in TASKS:
        again = summed(signature, asked(texts(task, slice(3, None))))
        assert routing.same_task(signature, again, books, threshold=0.3) == task
        assert routing.likeness(signature, books[task], books)[task] == pytest.approx(1)
    new = summed(signature, asked(OTHER))
    assert routing.same_task(signature, new, books, threshold=0.3) is None
    assert routing.same_task(signature, new, {}, threshold=0.3) is None
    assert routing.same_task(signature, new, books | {"melting": new}, threshold=0.999) == "melting"


def test_without_a_known_task_nothing_is_routed(signature: Any) -> None:
    with pytest.raises(ValueError, match="no task is known; measure one"):
        routing.route(signature, torch.nn.Identity(), PLACES, asked(["hello"]), {})


def test_sums_of_other_settings_are_not_compared(signature: Any, books: dict[str, Adapter]) -> None:
    small: Any = make("signature", {"buckets": 64})
    with pytest.raises(ValueError, match="sums of signature are"):
        routing.likeness(small, summed(small, asked(["hello"])), books)


def test_prototypes_tell_tasks_by_what_layers_make_of_their_rows_and_see_drift(tiny: Any) -> None:
    method: Any = make("prototype", {})
    base, draw = tiny(layers=2), torch.Generator().manual_seed(0)
    vocabularies = {"low": (3, 11), "middle": (33, 41), "new": (63, 71)}

    def drawn(task: str) -> Batch:
        rows = torch.randint(*vocabularies[task], (40, 12), generator=draw).tolist()
        return collate([Tokens(tuple(row), tuple(row)) for row in rows])

    known = {task: summed(method, drawn(task), base) for task in ("low", "middle")}
    fresh = {task: drawn(task) for task in vocabularies}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    guesses = {task: routing.route(method, base, PLACES, fresh[task], known) for task in known}
    assert sum(guess == task for task, of in guesses.items() for guess in of) >= 0.95 * 80
    far = {task: routing.drift(method, base, PLACES, fresh[task], known) for task in fresh}
    inside, outside = torch.cat([far["low"], far["middle"]]), far["new"]
    assert float((outside[:, None] > inside).double().mean()) >= 0.9  # the area under the ROC curve
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert base.training is False
