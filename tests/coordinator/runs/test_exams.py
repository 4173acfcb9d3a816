"""What sites tell of the rows that they hold out: how it is asked for, waited for, added up and reported."""

import json
import math
from typing import Any

import pytest

from offsite.coordinator.runs import examination, exams, outs
from offsite.protos.documents import from_json
from offsite.protos.exams import Gains, prediction
from offsite.protos.security.signing import verify
from offsite.protos.spec import EXAMS, TaskSpec

SETS = {"exam": "held-out.jsonl"}
LOSSES = {("bank", 0): 300.0, ("ward", 0): 500.0, ("bank", 1): 280.0, ("ward", 1): 420.0}
LAST = {("bank", 2): 270.0, ("ward", 2): 330.0}


def examined(stand: Any) -> list[TaskSpec]:
    tasks = [task for task in stand.journal.tasks("r") if task.round > EXAMS]
    for task in tasks:
        verify(task.spec, task.signature, stand.home.identity / "owner.pub", purpose="task")
    return [from_json(TaskSpec, task.spec, where="task") for task in tasks]


def test_each_version_is_measured_by_its_sites_and_the_last_one_in_an_exam(stand: Any) -> None:
    stand.losses = LOSSES | LAST
    stand.submit("bank", "ward", rounds=2, evaluation=SETS)
    report = json.loads(stand.run().report)
    steps = stand.journal.steps("r")
    assert [(task.site, task.examines, task.adapter) for task in examined(stand)] == [
        (site, 2, steps["version:2"]["version"]["broadcast"]["r8"]["digest"]) for site in ("bank", "ward")
    ]
    assert [exams.loss(stand.journal, "r", version) for version in range(4)] == [4.0, 3.5, 3.0, None]
    exam = report["exam"]
    assert exam["overall"] == {
        "emulator_zero_shot": pytest.approx(math.exp(4.0)),
        "emulator_tuned": pytest.approx(math.exp(3.0)),
    }
    assert exam["sites"]["ward"] == {
        **{"rows": 10, "tokens": 100, "noised": False},
        **{"emulator_zero_shot": pytest.approx(math.exp(5.0)), "emulator_tuned": pytest.approx(math.exp(3.3))},
    }
    assert [(one["round"], one["sites"]) for one in exam["rounds"]] == [(1, 2), (2, 2)]
    assert report["rounds"][1]["sites"]["bank"]["held_out_after"] == pytest.approx(math.exp(1.4))
    assert len(report["rounds"]) == 2 and report["left_out"] == []
    (gain,) = exam["prediction"]["versions"]
    assert gain["emulator"] == pytest.approx(1.0) and gain["round"] == 2
    told = [event for event in stand.journal.events("r") if event.kind == "exam"]
    assert [(event.round, event.site) for event in told] == [(2, "bank"), (2, "ward")]
    assert not [event for event in stand.journal.events("r") if event.round > 2]


@pytest.mark.parametrize("fields", [{"exam": "none"}, {}])
def test_where_nobody_tells_nobody_is_asked_again(stand: Any, fields: dict[str, Any]) -> None:
    stand.submit("bank", "ward", **fields)
    assert json.loads(stand.run().report)["exam"] is None and examined(stand) == []
    asked = [from_json(TaskSpec, task.spec, where="task").exam for task in stand.journal.tasks("r")]
    assert asked == [not fields] * 2


def test_who_is_out_is_not_asked_at_the_end_either(stand: Any) -> None:
    def act(task: Any) -> None:
        stand.upload(task)
        if (task.round, task.site) == (1, "bank"):
            outs.eject(stand.journal, "r", "bank", by="olga", reason="poison")

    stand.act, stand.losses = act, LOSSES | LAST
    stand.submit("bank", "ward", rounds=2)
    assert stand.run().state == "completed" and [task.site for task in examined(stand)] == ["ward"]


def test_who_is_away_at_the_end_holds_no_run_up(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(task: Any) -> None:
        if task.round < EXAMS:
            stand.upload(task)

    stand.act, stand.losses = act, LOSSES
    stand.submit("bank", "ward", rounds=2)
    monkeypatch.setattr(examination, "ABSENT_S", -1.0)
    row = stand.run()
    assert row.state == "completed"
    assert [task.state for task in stand.journal.tasks("r") if task.round > EXAMS] == ["stalled", "stalled"]
    exam = json.loads(row.report)["exam"]
    assert exam["overall"] == {} and exam["sites"]["bank"].keys() == {"rows", "tokens", "noised", "emulator_zero_shot"}
    assert [one["round"] for one in exam["rounds"]] == [1]
    assert json.loads(row.report)["left_out"] == [], "their updates are in all rounds"


def gains(*pairs: tuple[float, float]) -> list[Gains]:
    return [Gains(round=at, emulator=one, plug_in=other) for at, (one, other) in enumerate(pairs, start=1)]


@pytest.mark.parametrize(
    ("pairs", "words", "warns"),
    [
        ([], "is not known: no version was measured both at the sites", False),
        ([(0.5, 0.25)], "after round 1 both gain: +0.500 nats", False),
        (
            [(0.5, -0.25)],
            "one gains and the other loses: +0.500 nats a token on the emulator at the sites, -0.250 by",
            True,
        ),
        (
            [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)],
            "over 3 versions their correlation is 1.00, and the sign is one in 3",
            False,
        ),
        ([(1.0, 0.3), (2.0, 0.2), (3.0, 0.1)], "correlation is -1.00", True),
        ([(1.0, 0.2), (1.0, 0.3), (1.0, 0.1)], "the sign is one in 3 of 3 versions, too few or too alike", False),
    ],
)
def test_what_sites_gain_is_held_against_what_the_plug_in_gains(
    pairs: list[tuple[float, float]], words: str, warns: bool
) -> None:
    told = prediction(gains(*pairs))
    assert words in told["reason"] and bool(told["warning"]) == warns
    assert told["agree"] == sum(one * other > 0 for one, other in pairs)
