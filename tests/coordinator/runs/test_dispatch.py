"""Which runs are worked on: waiting costs no supervisor, has an end, and says for whom; places are bounded."""

import time
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.runs.dispatch import Dispatcher
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal
from offsite.protos.documents import to_json
from offsite.protos.events import Completed
from offsite.protos.spec import RunSpec


class Recorder:
    """Remembers for which runs a supervisor was asked for."""

    def __init__(self) -> None:
        self.fault = ""
        self.supervised: list[str] = []

    def start(self) -> None: ...

    def supervise(self, run: str) -> None:
        self.supervised.append(run)

    def close(self) -> None: ...


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return open_journal(f"sqlite://{tmp_path}/journal.db")


def submit(journal: Journal, name: str, **fields: Any) -> None:
    journal.add_run(name, token=name, owner="alice", spec=to_json(RunSpec(model="m", **fields)))


def states(journal: Journal) -> dict[str, tuple[str, str]]:
    return {run.id: (run.state, run.note) for run in journal.runs()}


def test_a_run_waits_without_a_supervisor_says_for_whom_and_begins_when_they_come(journal: Journal) -> None:
    executor = Recorder()
    dispatcher = Dispatcher(journal, executor)
    submit(journal, "a", sites=("school", "ward"))
    submit(journal, "b", min_sites=2)
    dispatcher.look()
    dispatcher.look()
    assert states(journal) == {
        "a": ("waiting", "waits for sites school, ward"),
        "b": ("waiting", "waits for 2 more sites"),
    }
    assert executor.supervised == [] and [event.kind for event in journal.events("a")] == ["waiting"], "told once"
    journal.enrol("school")
    dispatcher.look()
    assert states(journal)["a"] == ("waiting", "waits for site ward")
    journal.enrol("ward")
    dispatcher.look()
    assert states(journal) == {"a": ("running", ""), "b": ("running", "")} and executor.supervised == ["a", "b"]
    assert journal.steps("a")["sites"] == {"names": ["school", "ward"]}
    assert [event.kind for event in journal.events("a")] == ["waiting", "selected"]


def test_a_run_has_waited_for_as_long_as_it_may_though_the_coordinator_was_started_again(journal: Journal) -> None:
    submit(journal, "a", sites=("school",), wait_s=3600.0)
    Dispatcher(journal, Recorder()).look()
    journal.set_run("a", waiting_at=time.time() - 3590)
    Dispatcher(journal, Recorder()).look()
    assert states(journal)["a"][0] == "waiting"
    journal.set_run("a", waiting_at=time.time() - 3610)
    again = Dispatcher(journal, Recorder())
    again.look()
    assert states(journal)["a"][0] == "waiting", "a site gets a moment to come back"
    again._started -= 30
    again.look()
    run = journal.run("a")
    assert (run.state, run.note) == (
        "failed",
        "",
    ) and "site school did not enrol within 3600 s (here: none)" in run.error


def test_no_more_runs_are_worked_on_than_there_are_places_and_the_oldest_come_first(journal: Journal) -> None:
    executor = Recorder()
    dispatcher = Dispatcher(journal, executor, places=2)
    journal.enrol("school")
    for name in "abc":
        submit(journal, name)
    dispatcher.look()
    assert executor.supervised == ["a", "b"]
    assert states(journal)["c"] == ("queued", "waits until one of 2 runs that are worked on has ended")
    journal.end_run("a", Completed())
    dispatcher.look()
    assert executor.supervised == ["a", "b", "c"] and states(journal)["c"] == ("running", "")


def test_while_the_executor_is_at_fault_runs_say_so_and_are_taken_up_when_it_is_back(journal: Journal) -> None:
    executor = Recorder()
    dispatcher = Dispatcher(journal, executor)
    journal.enrol("school")
    submit(journal, "a")
    dispatcher.look()
    submit(journal, "b")
    executor.fault = "Ray is gone"
    dispatcher.look()
    assert states(journal) == {"a": ("running", "Ray is gone"), "b": ("queued", "Ray is gone")}
    executor.fault = ""
    dispatcher.look()
    assert states(journal) == {"a": ("running", ""), "b": ("running", "")}
    assert executor.supervised == ["a", "a", "b"]
    journal.set_run("a", note="step build waits")
    dispatcher.look()
    assert states(journal)["a"] == ("running", "step build waits"), "its supervisor said so"
    Dispatcher(journal, executor).look()
    assert states(journal)["a"] == ("running", ""), "of a supervisor before"


def test_a_spec_that_cannot_be_read_ends_its_run_and_no_other(journal: Journal) -> None:
    journal.add_run("a", token="a", owner="alice", spec=b'{"model": "m", "rounds": 0}')
    submit(journal, "b")
    journal.enrol("school")
    Dispatcher(journal, Recorder()).look()
    assert journal.run("a").state == "failed" and "rounds" in journal.run("a").error
    assert journal.run("b").state == "running"
