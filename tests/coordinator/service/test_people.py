"""What those who call for people are given while a store is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.results import Folded
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.service import people
from offsite.coordinator.service.people import RunsService
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal
from offsite.protos import runs_pb2 as pb
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json, to_plain
from offsite.protos.errors import NotFoundError, RefusedError
from offsite.protos.events import Completed, StepBegun
from offsite.protos.security.certificates import Peer
from offsite.protos.spec import Ancestor


class Open:
    """A gate that lets one person in."""

    def __init__(self, role: str = "owner", name: str = "olga") -> None:
        self._person: Any = Peer(role=role, name=name, serial=1, expires=datetime.max.replace(tzinfo=UTC))  # type: ignore[arg-type]

    @asynccontextmanager
    async def __call__(self, context: Any, *roles: str, request: Any) -> AsyncIterator[Peer]:
        assert self._person.role in roles
        yield self._person

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
            parts = [some async for some in service.Watch(pb.WatchRequest(id="r"), None)]
            return [event.kind for some in parts for event in some.events]

    assert asyncio.run(kinds()) == ["step", "completed"]
    journal.close()


def test_the_events_so_far_are_told_without_waiting_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people, "AHEAD", 2)
    journal = open_journal(f"sqlite://{tmp_path}/journal.db")
    journal.add_run("r", token="t", owner="olga", spec=b"{}")
    for step in "abcde":
        journal.add_event("r", StepBegun(step=step))
    gate: Any = Open()
    service = RunsService(journal, None, gate, Changes(journal), policy=OwnerPolicy())  # type: ignore[arg-type]

    async def seqs(after: int) -> list[int]:
        async with asyncio.timeout(60):
            parts = [some async for some in service.Watch(pb.WatchRequest(id="r", after=after, past=True), None)]
            assert all(0 < len(some.events) <= 2 for some in parts), "many at a time, and no more than are read at once"
            return [event.seq for some in parts for event in some.events]

    everything = asyncio.run(seqs(0))
    assert len(everything) == 5 and asyncio.run(seqs(everything[2])) == everything[3:]
    journal.close()


def add(journal: Journal, name: str, *, owner: str, start: str = "") -> None:
    """A completed run of two rounds."""
    its, _, number = start.partition(":")
    continues = Ancestor(run=its, round=int(number), rounds=1) if start else None
    grant = Grant(model="m", rounds=2, continues=continues)
    journal.add_run(name, token=name, owner=owner, spec=to_json(grant), granted=to_plain(grant))
    digest = digest_bytes(name.encode())
    version = Version(adapter=digest, broadcast={})
    for at in range(3):
        journal.add_step(name, f"version:{at}", to_plain(Folded(version=version, lineage={})))
    journal.end_run(name, Completed())


def test_a_researcher_sees_and_takes_back_versions_of_their_own_alone(tmp_path: Path) -> None:
    journal = open_journal(f"sqlite://{tmp_path}/journal.db")
    for name, owner, start in [("a", "rosa", ""), ("b", "rosa", "a:1"), ("c", "olga", "b:2"), ("x", "olga", "")]:
        add(journal, name, owner=owner, start=start)

    def asked(role: str, person: str, call: str, request: Any) -> list[str]:
        gate: Any = Open(role, person)
        service = RunsService(journal, {}, gate, Changes(journal), policy=OwnerPolicy())  # type: ignore[arg-type]
        reply = asyncio.run(getattr(service, call)(request, None))
        return [f"{one.run}{'-' if one.HasField('withdrawal') else ''}" for one in reply.versions]

    assert asked("researcher", "rosa", "Versions", pb.VersionsRequest(run="b")) == ["a", "b", "b"]
    assert asked("researcher", "rosa", "Versions", pb.VersionsRequest()) == ["a", "b"]
    assert asked("auditor", "ada", "Versions", pb.VersionsRequest(limit=2)) == ["c", "x"]
    for run in ("x", "nowhere"):
        with pytest.raises(NotFoundError, match=f"there is no run '{run}'"):
            asked("researcher", "rosa", "Versions", pb.VersionsRequest(run=run))
        with pytest.raises(NotFoundError, match=f"there is no run '{run}'"):
            asked("researcher", "rosa", "RollBack", pb.RollBackRequest(run=run, round=1, reason="why"))
    back = pb.RollBackRequest(run="b", round=1, reason="why")
    with pytest.raises(RefusedError, match="the owner went on from what came after b:1; ask the owner"):
        asked("researcher", "rosa", "RollBack", back)
    assert asked("owner", "olga", "RollBack", back) == ["a", "b", "b-"]
    assert asked("auditor", "ada", "Versions", pb.VersionsRequest(run="c")) == ["a", "b", "b-", "c-", "c-"]
    journal.close()
