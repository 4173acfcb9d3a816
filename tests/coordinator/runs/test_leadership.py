"""Which of several gateways dispatches: one at a time, another once it is gone, and the one before ends its work."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.retention import Retention
from offsite.coordinator.runs import leadership
from offsite.coordinator.runs.dispatch import Dispatcher
from offsite.coordinator.runs.leadership import Leadership
from offsite.coordinator.runs.supervisor import Supervisor
from offsite.coordinator.store.changes import Changes
from offsite.protos.documents import to_json
from offsite.protos.errors import ResourceError, UnreachableError
from offsite.protos.spec import RunSpec

DEADLINE_S = 60.0  # of what takes milliseconds: a test that hangs must fail


class Recorder:
    """Remembers for which runs a supervisor was asked for; one that is `broken` does not start."""

    def __init__(self) -> None:
        self.fault, self.broken, self.closed = "", False, 0
        self.supervised: list[str] = []

    def start(self) -> None:
        if self.broken:
            raise UnreachableError("nothing answers at the Ray cluster's address")

    def supervise(self, run: str) -> None:
        self.supervised.append(run)

    def close(self) -> None:
        self.closed += 1


class Standing:
    """A gateway's part in who dispatches."""

    def __init__(self, home: Home, name: str) -> None:
        self.journal, self.executor, self.moves = home.journal(), Recorder(), list[bool]()
        self.changes = Changes(self.journal)
        about: Any = {"name": name, "places": 8, "retention": Retention()}
        self.leadership = Leadership(home, self.journal, self.changes, lambda _: self.executor, **about)

    async def begin(self) -> None:
        await self.leadership.begin()
        self.jobs = [asyncio.create_task(self.leadership.work(self.moves.append)), asyncio.create_task(self._follow())]

    async def _follow(self) -> None:
        await self.changes.follow()

    def end(self) -> None:
        for job in self.jobs:
            job.cancel()
        self.leadership.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(leadership, "LOOK_S", 0.01)
    monkeypatch.setattr(leadership, "AGAIN_S", 0.2)
    made = Home(tmp_path / "home", tmp_path / "kit").prepare()
    made.use()
    return made


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.005)


def test_another_gateway_takes_over_when_the_one_that_dispatches_is_gone(home: Home) -> None:
    async def main() -> None:
        north, south = Standing(home, "north"), Standing(home, "south")
        await north.begin()
        await south.begin()
        assert north.leadership.leads and not south.leadership.leads
        south.journal.enrol("school")
        south.journal.add_run("a", token="a", owner="alice", spec=to_json(RunSpec(model="m")))
        await until(lambda: north.executor.supervised == ["a"])
        north.end()
        await until(lambda: south.leadership.leads)
        await until(lambda: south.executor.supervised == ["a"])
        assert south.moves == [True] and north.executor.closed == 1
        leader = south.journal.leader()
        assert leader is not None and leader == ("south", 2)
        south.end()

    asyncio.run(main())


def test_a_gateway_that_lost_the_journal_leaves_the_runs_to_the_one_that_has_it(home: Home) -> None:
    async def main() -> None:
        north, south = Standing(home, "north"), Standing(home, "south")
        await north.begin()
        north.leadership._hold.close()  # as when a database was away
        assert south.leadership._hold.take()
        await until(lambda: north.moves == [False])
        assert not north.leadership.leads and north.executor.closed == 1
        south.leadership._hold.close()
        await until(lambda: north.moves == [False, True])
        north.end()

    asyncio.run(main())


def test_a_gateway_whose_executor_does_not_start_leaves_the_runs_to_another(home: Home) -> None:
    async def main() -> None:
        north, south = Standing(home, "north"), Standing(home, "south")
        north.executor.broken = True
        with pytest.raises(UnreachableError, match="nothing answers"):
            await north.begin()
        north.leadership.close()
        await south.begin()
        north.jobs = [asyncio.create_task(north.leadership.work(north.moves.append))]
        south.executor.broken = True
        south.end()
        await until(lambda: north.executor.closed > 2)
        north.executor.broken = False
        await until(lambda: north.leadership.leads)
        north.end()

    asyncio.run(main())


@pytest.mark.parametrize("late", ["it is done", "it cannot be done"])
def test_a_step_of_who_dispatched_before_counts_for_nothing_though_it_ends_last(stand: Any, late: str) -> None:
    stand.submit("school", rounds=2)
    journal, perform, twice = stand.journal, stand.perform, []
    journal.lead("north")

    def slowly(step: str, *order: Any) -> bytes:
        result = bytes(perform(step, *order))
        if step == "aggregate" and not twice:
            twice.append(result)
            journal.lead("south")
            stand.perform = perform
            assert stand.run().state == "completed", "by a supervisor of the other gateway"
            stand.ended = journal.steps("r"), journal.events("r"), journal.tasks("r")
            if late == "it cannot be done":
                raise ResourceError("the disk of north is full")
        return result

    stand.perform = slowly
    assert stand.run().state == "completed" and len(twice) == 1
    assert (journal.steps("r"), journal.events("r"), journal.tasks("r")) == stand.ended
    assert sorted(one.kind for one in journal.events("r") if one.kind in ("completed", "failed", "round")) == [
        "completed",
        "round",
        "round",
    ]


def test_a_step_that_fails_where_a_gateway_dispatched_before_does_not_end_the_run(stand: Any) -> None:
    stand.submit("school")
    stand.journal.lead("north")

    def fail(*_: Any) -> bytes:
        stand.journal.lead("south")
        raise ResourceError("the disk of north is full")

    perform, stand.perform = stand.perform, fail
    assert stand.run().state == "running"
    stand.perform = perform
    assert stand.run().state == "completed"


def test_who_dispatched_before_starts_no_supervisor_and_those_it_started_end(stand: Any) -> None:
    stand.submit("school")
    journal = stand.journal
    journal.lead("north")
    before = Dispatcher(journal, executor := Recorder())
    taken = time.monotonic()

    def rest(_: float) -> None:
        assert time.monotonic() - taken < DEADLINE_S, "it goes on"
        journal.lead("south")

    Supervisor(stand.home, "r", perform=stand.perform, rest=rest).run()
    assert journal.run("r").state == "running" and [type(one).__name__ for one in stand.done] == ["Build"]
    before.look()
    assert executor.supervised == []
    Dispatcher(journal, executor).look()
    assert executor.supervised == ["r"]
    assert stand.run().state == "completed", "by a supervisor of the gateway that dispatches"
