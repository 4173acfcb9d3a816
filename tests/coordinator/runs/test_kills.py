"""A run that is killed before or after any of its journal's writes, and taken up again, ends as an undisturbed one."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.runs.dispatch import Dispatcher
from offsite.coordinator.store import sqlite
from offsite.coordinator.store.database import Database
from offsite.coordinator.store.journal import LIVE
from offsite.protos.spec import Choice

SPEC: dict[str, Any] = {
    **{"rounds": 2, "sites": ("bank", "town", "ward"), "min_sites": 2, "realign_steps": 1},
    **{"evaluation": {"exam": "held-out.jsonl"}, "evaluate_every": 1, "builders": (Choice(name="any"),)},
    **{"attack_steps": 2, "attack_text": "task.jsonl", "contributions": True},
}


class Here:
    """Supervises in the thread that asks."""

    fault = ""

    def __init__(self, stand: Any) -> None:
        self._stand = stand

    def start(self) -> None: ...

    def supervise(self, run: str) -> None:
        self._stand.run()

    def close(self) -> None: ...


def act(stand: Any) -> Callable[[Any], None]:
    """Sites that are slow, fail, refuse, and whose updates get lost; the same at every repetition."""

    def work(task: Any) -> None:
        where = (task.site, task.round, task.attempt)
        if task.state == "offered":
            stand.move(task, step=1, steps=2, loss=0.5)
        elif where == ("bank", 0, 0):
            stand.close(task)
        elif where == ("town", 1, 0):
            stand.close(task, "refused", "policy")
        else:
            stand.upload(task, keep=where != ("bank", 1, 0))

    return work


def drive(stand: Any) -> None:
    """Take the run as far as it goes, from wherever it is."""
    stand.losses = {(site, version): 300.0 - 50.0 * version for site in ("bank", "ward") for version in range(3)}
    stand.submit(**SPEC)
    dispatcher = Dispatcher(stand.journal, Here(stand))
    dispatcher.look()
    for site in SPEC["sites"]:
        stand.journal.enrol(site)
    while stand.journal.run("r").state in LIVE:
        Dispatcher(stand.journal, Here(stand)).look()


def story(stand: Any) -> dict[str, Any]:
    """All that is left of a run but moments in time, how often a step was begun, and which of two sites was first."""
    row = stand.journal.run("r")
    told: dict[str, list[Any]] = {}
    for event in stand.journal.events("r"):
        mine, one = told.setdefault(event.site, []), (event.kind, event.round, event.data)
        if event.kind != "step" or one not in mine:
            mine.append(one)
    tasks = [(t.round, t.site, t.attempt, t.state, t.update, t.message, t.spec) for t in stand.journal.tasks("r")]
    files = [(file.name, file.digest, file.size) for file in stand.journal.artifacts("r")]
    report = json.loads(row.report)
    del report["seconds"]
    return {
        **{"state": row.state, "error": row.error, "report": report, "events": told, "tasks": tasks, "files": files},
        "steps": {name: value for name, value in stand.journal.steps("r").items()},
    }


def run(stand: Any) -> dict[str, Any]:
    """Take up what is in the stand's home, as a new process would, and bring it to its end."""
    again = type(stand)(stand.home)
    again.act = act(again)
    drive(again)
    again.journal.close()
    return story(again)


@pytest.mark.slow
def test_a_kill_before_or_after_any_write_changes_nothing_that_is_left(
    stand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, numbers = Database._write, itertools.count(1)

    @contextmanager
    def write(journal: Database) -> Iterator[Any]:
        shutil.copytree(stand.home.root, tmp_path / f"before write {next(numbers)}")
        with whole(journal) as connection:
            yield connection

    monkeypatch.setattr(sqlite, "PRAGMAS", ("journal_mode=WAL", "synchronous=OFF"))  # no power is cut here
    with monkeypatch.context() as watched:
        watched.setattr(Database, "_write", write)
        undisturbed = run(stand)
    assert undisturbed["state"] == "completed"
    assert {"base_tuned", "attack"} <= undisturbed["steps"].keys() & undisturbed["report"]["overall"].keys()
    assert {kind for events in undisturbed["events"].values() for kind, *_ in events} == {
        *(
            "waiting",
            "selected",
            "step",
            "bundle",
            "figure",
            "warning",
            "begun",
            "site",
            "update",
            "exam",
            "round",
            "completed",
        ),
    }
    left = sorted(tmp_path.glob("before write *"))
    assert len(left) > 40, "each is a moment at which a kill leaves something else"
    for home in left:  # before a write is after the last one
        shutil.rmtree(stand.home.root)
        home.rename(stand.home.root)
        assert run(stand) == undisturbed, home.name
