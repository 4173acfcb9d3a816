"""Sites that wait are woken by whoever writes, miss nothing, and cost one question and one write for all of them."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from offsite.coordinator.service import waiting
from offsite.coordinator.service.threads import Batch
from offsite.coordinator.service.waiting import WaitingRoom
from offsite.coordinator.store import changes as changes_module
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.journal import Journal, Key, Row
from offsite.coordinator.store.opening import open_journal
from offsite.protos.errors import IdentityError
from offsite.protos.events import StepBegun
from offsite.protos.security.certificates import Peer

DEADLINE_S = 60.0  # of what takes milliseconds: a test that hangs must fail
NEVER_S = 3600.0

WRITER = """
import sys
from offsite.coordinator.store.journal import Key
from offsite.coordinator.store.opening import open_journal
journal = open_journal(sys.argv[1])
journal.add_task(Key(run="r", round=0, site="ward", attempt=0), spec=b"task", signature=b"s")
"""


class Open:
    """A gate that lets everybody stay until it is told to turn them out."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()

    def recheck(self, caller: Peer) -> None:
        if caller.name in self.revoked:
            raise IdentityError(f"{caller.name} is revoked")


class Coordinator:
    """A waiting room over a journal, with what keeps it going."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.gate = journal, Open()
        self.changes = Changes(journal)
        self.room = WaitingRoom(journal, self.gate, self.changes)  # type: ignore[arg-type]  # a gate's one method

    def run(self, body: Coroutine[Any, Any, Any]) -> Any:
        async def main() -> Any:
            jobs = [asyncio.create_task(job) for job in (self.changes.follow(), self.room.work())]
            try:
                return await asyncio.wait_for(body, DEADLINE_S)
            finally:
                for job in jobs:
                    job.cancel()

        return asyncio.run(main())

    async def waits(self, *names: str) -> list["asyncio.Task[Row | None]"]:
        """Let sites wait, and return once they do."""
        calls = [asyncio.create_task(self.room.task(peer(name), NEVER_S)) for name in names]
        while len(self.room) < len(names) or self.room._next_task._work is not None:
            await asyncio.sleep(0)
        return calls


def peer(name: str) -> Peer:
    return Peer(role="site", name=name, serial=1, expires=datetime.max.replace(tzinfo=UTC))


def offer(journal: Journal, *names: str) -> None:
    journal.add_tasks([(Key(run="r", round=0, site=name, attempt=0), name.encode(), b"s") for name in names])


@pytest.fixture
def journal(url: str) -> Iterator[Journal]:
    made = open_journal(url)
    made.add_run("r", token="t", owner="alice", spec=b"spec")
    yield made
    made.close()


def test_a_write_of_this_process_wakes_the_site_it_is_for_without_a_look_and_no_other(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes_module, "LOOK_S", NEVER_S)
    coordinator = Coordinator(journal)

    async def main() -> None:
        ward, school = await coordinator.waits("ward", "school")
        offer(journal, "ward")
        task = await ward
        assert task is not None and task.spec == b"ward" and not school.done()

    coordinator.run(main())


def test_a_write_of_another_process_wakes_a_site(journal: Journal, url: str) -> None:
    coordinator = Coordinator(journal)

    async def main() -> None:
        [ward] = await coordinator.waits("ward")
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", WRITER, url], check=True)
        task = await ward
        assert task is not None and task.spec == b"task"

    coordinator.run(main())


def test_a_task_written_between_a_sites_look_and_its_wait_is_not_missed(journal: Journal) -> None:
    handed_out = threading.Event()

    class Late(Journal):
        """Answers a site's look only after a task that it has not seen was written and handed out."""

        looks = 0

        def next_tasks(self, names: Sequence[str]) -> list[Row | None]:
            self.looks += 1
            tasks = super().next_tasks(names)
            if self.looks == 1:
                assert tasks == [None]
                offer(journal, "ward")
                assert handed_out.wait(DEADLINE_S / 2), "nobody was known to wait when the task was written"
            return tasks

    late = Late(journal._dialect)
    coordinator = Coordinator(late)
    tell = coordinator.room._tell

    def telling(task: Row) -> None:
        tell(task)
        handed_out.set()

    coordinator.room._tell = telling  # type: ignore[method-assign]
    task = coordinator.run(coordinator.room.task(peer("ward"), NEVER_S))
    assert task is not None and task.spec == b"ward"
    late.close()


def test_a_change_between_a_look_and_the_wait_for_it_is_not_missed(journal: Journal) -> None:
    coordinator = Coordinator(journal)

    async def main() -> None:
        number = coordinator.changes.number
        journal.add_event("r", StepBegun(step="build"))  # nothing is awaited: it is found before the wait, or during it
        assert await coordinator.changes.after(number) > number
        number = coordinator.changes.number
        coordinator.changes._wake()
        assert await coordinator.changes.after(number) == number + 1

    coordinator.run(main())


def test_a_journal_that_nobody_writes_to_is_not_asked(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "LOOK_S", 1e-4)
    coordinator = Coordinator(journal)
    asked: list[str] = []
    monkeypatch.setattr(Journal, "offered", lambda self: asked.append("offered") or set())

    async def main() -> None:
        calls = await coordinator.waits(*(f"site-{number}" for number in range(50)))
        first = len(asked)
        for _ in range(500):
            await asyncio.sleep(0)
        assert len(asked) == first <= 1 and not any(call.done() for call in calls)
        journal.add_event("r", StepBegun(step="build"))
        number = coordinator.changes.number
        await coordinator.changes.after(number)
        while len(asked) == first:
            await asyncio.sleep(0)

    coordinator.run(main())


def test_all_who_wait_or_were_heard_are_recorded_in_one_write(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(f"site-{number}" for number in range(9))
    for name in (*names, "busy"):
        journal.enrol(name)
    with journal._write() as connection:
        connection.exec_driver_sql("UPDATE sites SET seen_at = 0")
    writes: list[list[str]] = []
    see = Journal.see
    monkeypatch.setattr(Journal, "see", lambda self, *heard: (writes.append(sorted(heard)), see(self, *heard)))
    coordinator = Coordinator(journal)

    async def main() -> None:
        await coordinator.waits(*names)
        coordinator.room.hear("busy")
        monkeypatch.setattr(waiting, "BEAT_S", 0.0)
        while not any("busy" in write for write in writes[:-1]):
            await asyncio.sleep(0)

    monkeypatch.setattr(waiting, "BEAT_S", 0.05)
    coordinator.run(main())
    beat = next(number for number, write in enumerate(writes) if "busy" in write)  # on a slow machine not the first
    assert writes[beat] == ["busy", *names] and writes[beat + 1] == names, "who was heard once is recorded once"
    assert journal.present(since=1.0) == ["busy", *names]


def test_who_is_revoked_waits_no_longer_and_others_do(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BEAT_S", 0.001)
    coordinator = Coordinator(journal)

    async def main() -> None:
        ward, school = await coordinator.waits("ward", "school")
        coordinator.gate.revoked.add("ward")
        with pytest.raises(IdentityError, match="ward is revoked"):
            await ward
        assert not school.done() and len(coordinator.room) == 1
        assert await coordinator.room.task(peer("school"), 0.0) is None, "one poll of two that a site has open"
        assert len(coordinator.room) == 1
        school.cancel()
        await asyncio.wait([school])
        assert len(coordinator.room) == 0, "nothing is kept of who has gone"

    coordinator.run(main())


def test_nobody_waits_for_a_coordinator_that_ends(journal: Journal) -> None:
    coordinator = Coordinator(journal)

    async def main() -> None:
        calls = await coordinator.waits("ward", "lab")
        coordinator.room.close()
        assert await asyncio.gather(*calls) == [None, None] and len(coordinator.room) == 0

    coordinator.run(main())


def test_what_comes_in_a_burst_is_done_in_few_calls_and_one_fault_is_not_the_others() -> None:
    calls: list[list[int]] = []

    def double(items: list[int]) -> list[int]:
        calls.append(items)
        if 13 in items:
            raise ZeroDivisionError
        return [2 * item for item in items]

    async def main() -> None:
        batch = Batch(double)
        assert await asyncio.gather(*(batch(item) for item in range(10))) == [2 * item for item in range(10)]
        assert len(calls) <= 2
        gone = asyncio.create_task(batch(7))
        rest = asyncio.gather(*(batch(item) for item in (12, 13, 14)), return_exceptions=True)
        await asyncio.sleep(0)
        gone.cancel()
        twelve, thirteen, fourteen = await rest
        assert (twelve, fourteen) == (24, 28) and isinstance(thirteen, ZeroDivisionError)

    asyncio.run(main())
