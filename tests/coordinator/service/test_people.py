"""What those who call for people are given while a store is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.service import people
from offsite.coordinator.service.people import RunsService
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal
from offsite.protos import runs_pb2 as pb
from offsite.protos.events import Completed, StepBegun
from offsite.protos.security.certificates import Peer


class Open:
    """A gate that lets one person in."""

    @asynccontextmanager
    async def __call__(self, context: Any, *roles: str, request: Any) -> AsyncIterator[Peer]:
        yield Peer(role="owner", name="olga", serial=1, expires=datetime.max.replace(tzinfo=UTC))

    def recheck(self, caller: Peer) -> None: ...


def test_who_watches_a_run_waits_while_the_journal_is_away_and_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "RECHECK_S", 0.01)
    journal = open_journal(f"sqlite://{tmp_path}/journal.db")
    journal.add_run("r", token="t", owner="olga", spec=b"{}")
    journal.add_event("r", StepBegun(step="build"))
    whole, looks = Journal.events, iter(range(9))

    def events(self: Journal, run: str, **which: Any) -> Any:
        look = next(looks)
        if look == 3:
            journal.end_run("r", Completed())
        if look in (1, 2, 3, 4):
            raise Unwritable("postgresql://db/offsite: the server cannot be reached")
        return whole(self, run, **which)

    monkeypatch.setattr(Journal, "events", events)
    gate: Any = Open()
    service = RunsService(journal, None, gate, Changes(journal), policy=OwnerPolicy())  # type: ignore[arg-type]

    async def kinds() -> list[str]:
        async with asyncio.timeout(60):
            return [event.kind async for event in service.Watch(pb.WatchRequest(id="r"), None)]

    assert asyncio.run(kinds()) == ["step", "completed"]
    journal.close()
