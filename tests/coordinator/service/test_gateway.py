"""A gateway among others: what it says of a journal that is away."""

import asyncio
import logging
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs import dispatch
from offsite.coordinator.runs.dispatch import Dispatcher
from offsite.coordinator.service import gateway as gateway_module
from offsite.coordinator.service import waiting
from offsite.coordinator.service.gateway import Gateway
from offsite.coordinator.service.waiting import WaitingRoom
from offsite.coordinator.store import changes as changes_module
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal
from offsite.protos.security.certificates import Peer

SENTENCE = "postgresql://db/offsite: the server cannot be reached"
DEADLINE_S = 60.0  # of what takes milliseconds: a test that hangs must fail


class Remote(Journal):
    """A journal that can be away, and counts what is tried."""

    away, tries = False, Counter[str]()

    def tried(self, name: str) -> None:
        self.tries[name] += 1
        if self.away:
            raise Unwritable(f"{SENTENCE} ({sum(self.tries.values())})")

    def announce(self, *arguments: Any, **about: Any) -> None:
        self.tried("gateway")

    def see(self, *names: str) -> None:
        self.tried("sites")

    def live(self) -> Any:
        self.tried("dispatcher")
        return []

    async def until_all_tried(self) -> None:
        self.tries = Counter[str]()
        while len(self.tries) < 3 or min(self.tries.values()) < 5:
            await asyncio.sleep(0.002)


def test_a_journal_that_is_away_is_said_once_and_once_that_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (gateway_module, waiting, changes_module, dispatch):
        for name in {"BEAT_S", "AGAIN_S", "LOOK_S", "REST_S"} & vars(module).keys():
            monkeypatch.setattr(module, name, 0.002)
    caplog.set_level(logging.INFO, logger="offsite")
    home = Home(tmp_path / "home", tmp_path / "kit").prepare()
    home.identity.mkdir()
    (home.identity / "owner.pub").write_bytes(b"key")
    journal = Remote(home.journal()._dialect)
    gate: Any = SimpleNamespace(recheck=lambda caller: None)
    executor: Any = SimpleNamespace(fault="")
    changes = Changes(journal)
    room = WaitingRoom(journal, gate, changes)
    ward = Peer(role="site", name="ward", serial=1, expires=datetime.max.replace(tzinfo=UTC))

    async def main() -> None:
        gateway, dispatcher = Gateway(home, journal, home.blobs(), policy=OwnerPolicy()), Dispatcher(journal, executor)
        jobs = (gateway.work(), room.work(), changes.follow(), dispatcher.work(changes), room.task(ward, DEADLINE_S))
        work = [asyncio.create_task(job) for job in jobs]
        async with asyncio.timeout(DEADLINE_S):
            for journal.away in (True, False, True, False):
                await journal.until_all_tried()
        for task in work:
            task.cancel()

    asyncio.run(main())
    said = [(record.levelname, record.getMessage().split(" (")[0].split(", after")[0]) for record in caplog.records]
    assert said == 2 * [("ERROR", SENTENCE), ("WARNING", "the journal can be used again")]
    journal.close()
