"""What was learned and forgotten, against matrices that were counted by hand."""

import json
import math
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from offsite.client import plots
from offsite.client.commands.eval import table
from offsite.client.forgetting import Forgetting, Stage, forgetting
from offsite.client.session import Session
from offsite.protos.errors import InputError

TASKS = ("wards", "bank", "school")
BASE = (3.0, 4.0, 5.0)
AFTER = ((2.0, 3.5, 5.0), (2.6, 1.0, 4.8), (2.5, 1.4, 2.0))  # nats, by run


def report(run: str, task: str, nats: tuple[float, ...], **more: Any) -> dict[str, Any]:
    rows = {
        name: {"base_zero_shot": math.exp(base), "plug_in": math.exp(loss)}
        for name, base, loss in zip(TASKS, BASE, nats, strict=True)
    }
    return {
        "run": run,
        "task": task,
        "sites": rows,
        "tokens": dict.fromkeys(TASKS, 10),
        "bytes": {"down": 100, "up": 7},
        "method": {"name": "lora"},
        "strategy": {"name": "low-rank"},
        "memory": {"name": "lae"},
    } | more


@pytest.fixture
def stream() -> Forgetting:
    reports = [report(f"run{at}", task, nats) for at, (task, nats) in enumerate(zip(TASKS, AFTER, strict=True))]
    reports[2]["sites"]["school"]["base_tuned"] = math.exp(1.5)
    return forgetting(reports, kept={"run2": 9})


def test_the_means_are_those_counted_by_hand(stream: Forgetting) -> None:
    assert stream.tasks == TASKS and stream.earlier == TASKS[:2]
    assert stream.average == pytest.approx((2.5 + 1.4 + 2.0) / 3)
    assert stream.of("wards") == pytest.approx(2.5 - 2.0) and stream.of("bank") == pytest.approx(1.4 - 1.0)
    assert stream.forgetting == pytest.approx(0.45)
    assert stream.backward == pytest.approx(-0.45), "each was best when it was learned"
    assert stream.forward == pytest.approx(((4.0 - 3.5) + (5.0 - 4.8)) / 2)
    assert stream.intransigence == pytest.approx(2.0 - 1.5)
    assert stream.stages[2] == Stage("run2", "school", "lora", "low-rank", "lae", 100, 7, 9)


def test_forgetting_counts_from_the_best_since_it_was_learned_and_a_task_may_come_again() -> None:
    reports = [
        report("a", "wards", (2.0, 4.0, 5.0)),
        report("b", "bank", (1.9, 1.0, 5.0)),
        report("c", "wards", (1.8, 1.5, 5.0)),
    ]
    stream = forgetting(reports)
    assert stream.of("wards") == pytest.approx(1.8 - 1.9), "below 0: it was learned on"
    assert stream.backward == pytest.approx(((2.0 - 1.8) + (1.0 - 1.5)) / 2)
    assert stream.learned("wards") == 1 and stream.tasks == ("wards", "bank")


def test_a_set_is_of_the_task_that_its_name_begins_with_and_sets_count_by_tokens() -> None:
    one = report("a", "wards", (2.0, 4.0, 5.0))
    one["sites"] = {
        name: {"base_zero_shot": math.e, "plug_in": math.exp(nats)}
        for name, nats in {"wards-icu": 1.0, "wards.er": 4.0, "wardship": 9.0}.items()
    }
    one["tokens"] = {"wards-icu": 30, "wards.er": 10, "wardship": 50}
    assert forgetting([one]).losses[1] == {"wards": pytest.approx((30 * 1.0 + 10 * 4.0) / 40)}


def test_a_run_that_was_gone_on_from_counts_with_the_round_it_was_left_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [{"sets": dict(zip(TASKS, map(math.exp, AFTER[0]), strict=True))}, {"sets": {}}, {}]
    first = report("a", "wards", (9.0, 9.0, 9.0), rounds=rounds)
    runs = {"a": first, "b": report("b", "bank", AFTER[1], rounds=[{}])}
    session = Session.__new__(Session)
    monkeypatch.setattr(session, "run", lambda id: SimpleNamespace(report=deepcopy(runs[id])), raising=False)
    for at, expected in ((1, AFTER[0]), (2, ()), (3, (9.0, 9.0, 9.0))):
        last = [SimpleNamespace(run="a", round=at, kept=0), SimpleNamespace(run="b", round=1, kept=0)]
        monkeypatch.setattr(session, "versions", lambda run, last=last: last, raising=False)
        losses = session.forgetting("b").losses
        assert losses[1] == pytest.approx(dict(zip(TASKS[:2], expected, strict=False))), at


def test_what_cannot_be_told_is_said() -> None:
    with pytest.raises(InputError, match="none of these runs says which task it learned"):
        forgetting([report("a", "", AFTER[0])])
    with pytest.raises(InputError, match="measured on no set of the tasks kitchen"):
        forgetting([report("a", "kitchen", AFTER[0])])
    alone = forgetting([report("a", "wards", AFTER[0])])
    assert alone.earlier == () and math.isnan(alone.forgetting) and math.isnan(alone.intransigence)


def test_it_is_shown_as_a_table_and_a_plot(stream: Forgetting) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(*table(stream), sep="\n")
    text = capture.get()
    assert "wards forgot +0.500, bank forgot +0.400" in text and "forgetting +0.450" in text
    assert all(word in text for word in (*TASKS, "the base", "run2", f"{math.exp(2.6):.2f}"))
    drawn = plots.forgetting(stream)
    assert drawn.lstrip().startswith("<?xml") and all(f"after {task}" in drawn for task in TASKS)
    assert plots.forgetting(stream) == drawn
    json.dumps(stream.summary(), allow_nan=False)
