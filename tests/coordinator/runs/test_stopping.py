"""Which version is the best, when a run stops, and what it publishes then."""

import json
import math
from typing import Any

import pytest

from offsite.coordinator.runs import judging
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.legality import judge
from offsite.coordinator.runs.lineage import lineage
from offsite.coordinator.runs.steps.orders import Evaluate, Publish
from offsite.coordinator.runs.steps.results import STOP, Evaluation, evaluate, fold
from offsite.coordinator.runs.supervisor import Lost
from offsite.protos.errors import InputError
from offsite.protos.figures import Score
from offsite.protos.spec import Choice, RunSpec

EXAM = {"exam": "held-out.jsonl"}


def losing(stand: Any, *losses: float | None) -> None:
    """Have the plug-in of each round lose so many nats a token."""

    def measure(order: bytes) -> Evaluation:
        asked = stand._take(Evaluate, order)
        history = History(stand.journal, "r")
        rounds = [at for at in range(1, len(losses) + 1) if history.get(fold(at)) and asked.adapter]
        number = next((at for at in rounds if history.version(at).adapter == asked.adapter), 0)
        loss = losses[number - 1] if number else 2.0
        return Evaluation(sets={"exam": Score(nll=None if loss is None else 1000 * loss, tokens=1000)})

    stand._evaluate = measure


def published(stand: Any) -> dict[str, int]:
    """By folder, the round whose version was published there."""
    history = History(stand.journal, "r")
    adapters = {history.version(at).adapter: at for at in range(1, history.rounds(99) + 1) if history.get(fold(at))}
    return {order.folder: adapters[order.adapter] for order in stand.done if isinstance(order, Publish)}


def test_a_run_stops_once_its_patience_is_over_and_publishes_the_best_and_the_last(stand: Any) -> None:
    losing(stand, 1.5, 1.2, 1.3, 1.4, 0.1)
    stand.submit("ward", rounds=9, evaluation=EXAM, patience=2)
    row = stand.run()
    assert row.state == "completed" and stand.journal.rounds_done(["r"]) == {"r": 4}
    report, history = json.loads(row.report), History(stand.journal, "r")
    assert report["outcome"] == {"round": 2, "last": 4, "stopped": history[STOP].reason}
    assert history[STOP].reason == (
        "stopped after round 4 of 9: for 2 rounds no version has been better than that of round 2, at 1.2000 nats a "
        "token"
    )
    assert published(stand) == {"": 2, "last": 4}
    assert report["overall"]["plug_in"] == pytest.approx(math.exp(1.2)), "the figures are those of what is published"
    assert [round["figures"]["plug_in"] for round in report["rounds"]] == pytest.approx(
        [math.exp(loss) for loss in (1.5, 1.2, 1.3, 1.4)]
    )
    assert [one.figures["plug_in"] for one in lineage(stand.journal, "r")][-1] == pytest.approx(math.exp(1.4))
    (stopped,) = stand.journal.events("r", kind="stopped")
    assert (stopped.round, stopped.data["best"]) == (4, 2)
    tasks = [task.round for task in stand.journal.tasks("r")]
    assert tasks == [0, 1, 2, 3], "no site is asked for work that is of no use"


def test_without_patience_the_best_of_what_was_measured_is_published_all_the_same(stand: Any) -> None:
    losing(stand, 1.5, 1.2, 1.3)
    stand.submit("ward", rounds=3, evaluation=EXAM, evaluate_every=2)
    report = json.loads(stand.run().report)
    assert published(stand) == {"": 2, "last": 3} and report["outcome"] == {"round": 2, "last": 3, "stopped": ""}


@pytest.mark.parametrize("fields", [{}, {"evaluation": EXAM}, {"evaluation": EXAM, "evaluate_every": 1}])
def test_a_last_version_that_is_the_best_or_alone_measured_is_published_once(stand: Any, fields: Any) -> None:
    losing(stand, 1.5, 1.2)
    stand.submit("ward", rounds=2, **fields)
    stand.run()
    assert published(stand) == {"": 2}


@pytest.mark.parametrize(
    ("losses", "patience", "least", "every", "ends"),
    [
        ((1.0, 0.99, 0.98, 0.97), 2, 0.05, 0, 3),  # small steps, and not enough of them
        ((1.0, 0.97, 0.94, 0.93, 0.92), 2, 0.05, 0, 5),  # they add up
        ((1.0, None, 0.9, 1.0, 1.0), 2, 0.0, 0, 5),  # a version that is broken is no gain, and no end
        ((None, 1.0, 1.1, 1.2), 1, 0.0, 0, 3),
        ((1.0, 1.0, 1.0, 1.0), 1, 0.0, 2, 4),  # judged where it is measured alone
        ((1.0, 0.9, 1.1, 1.2), 1, 0.0, 0, 3),
    ],
)
def test_what_is_a_gain_and_what_is_not(
    stand: Any, losses: Any, patience: int, least: float, every: int, ends: int
) -> None:
    spec = RunSpec(model="m", rounds=9, evaluation=EXAM, patience=patience, least_gain=least, evaluate_every=every)
    stand.submit("ward")
    history, stops = History(stand.journal, "r"), []
    for number, loss in enumerate(losses, 1):
        if judging.due(spec, number):
            score = Score(nll=None if loss is None else 1000 * loss, tokens=1000)
            history.record(evaluate(f"plug_in:{number}"), Evaluation(sets={"exam": score}))
        stops.append(judging.stop(spec, history, number) is not None)
    assert stops.index(True) + 1 == ends


def test_a_run_that_is_killed_anywhere_stops_at_the_same_round_with_the_same_outcome(stand: Any) -> None:
    losing(stand, 1.2, 1.3)
    stand.submit("ward", rounds=9, evaluation=EXAM, patience=1)
    whole, seen = stand.perform, set[str]()

    def killed_once(step: str, spec: bytes, order: bytes, needs: Any) -> bytes:
        if (key := f"{step} {len(stand.journal.steps('r'))}") not in seen:
            seen.add(key)
            whole(step, spec, order, needs)
            raise Lost("killed as it ended")
        return bytes(whole(step, spec, order, needs))

    stand.perform = killed_once
    for _ in range(40):
        try:
            if stand.run().state == "completed":
                break
        except Lost:
            continue
    assert len(seen) > 8 and published(stand) == {"": 1, "last": 2}
    assert len(stand.journal.events("r", kind="stopped")) == 1


def test_what_was_never_measured_has_no_best(stand: Any) -> None:
    stand.submit("ward")
    history = History(stand.journal, "r")
    assert judging.best(history, 3) is None and judging.judged(history, 1) is None
    history.record(evaluate("plug_in:2"), Evaluation(sets={"exam": Score(nll=None, tokens=5)}))
    assert judging.judged(history, 2) == math.inf and judging.best(history, 3) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"patience": 1}, "versions are judged on held-out examples"),
        ({"least_gain": 0.1}, "least_gain is for a run that stops"),
        ({"patience": 1, "evaluation": EXAM, "memory": Choice(name="ema")}, "memory ema moves at a pace that the"),
    ],
)
def test_a_patience_that_has_nothing_to_go_by_is_refused(fields: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        judge(RunSpec(model="m", **fields))
