"""Sites that wait for a task: one query for all of them when the journal has changed, none while nothing happens."""

import asyncio
from contextlib import suppress

from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.threads import Batch, in_thread
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal, Row
from offsite.protos.errors import OffsiteError
from offsite.protos.security.certificates import Peer

BEAT_S = 2.0
AGAIN_S = 1.0  # after the journal could not be used


class WaitingRoom:
    """Who waits for a task, and who was heard; it tells the journal every few seconds, in one transaction."""

    def __init__(self, journal: Journal, gate: Gate, changes: Changes) -> None:
        self._journal, self._gate, self._changes = journal, gate, changes
        self._calls: dict[str, dict[asyncio.Future[Row | None], Peer]] = {}  # by site
        self._heard: set[str] = set()
        self._next_task = Batch(journal.next_tasks)

    def __len__(self) -> int:
        """Return how many sites wait."""
        return len(self._calls)

    def hear(self, site: str) -> None:
        """Note that a site called."""
        self._heard.add(site)

    async def task(self, site: Peer, wait_s: float) -> Row | None:
        """Return a site's next open task, once there is one; None if there is none for so long.

        Raises IdentityError when its certificate ceases to hold meanwhile.
        """
        self.hear(site.name)
        call: asyncio.Future[Row | None] = asyncio.get_running_loop().create_future()
        calls = self._calls.setdefault(site.name, {})
        calls[call] = site  # before the look: a task that is written after it is handed out by `work`
        try:
            return await self._next_task(site.name) or await asyncio.wait_for(call, wait_s)
        except TimeoutError:
            return None
        finally:
            del calls[call]
            if not calls:
                del self._calls[site.name]

    def close(self) -> None:
        """Let nobody wait any longer: the coordinator ends."""
        for calls in self._calls.values():
            for call in calls:
                if not call.done():
                    call.set_result(None)

    async def work(self) -> None:
        """Hand out tasks as they are written, and keep the journal up to date on who is here."""
        await asyncio.gather(self._hand_out(), self._beat())

    async def _hand_out(self) -> None:
        number = -1
        while True:
            number = await self._changes.after(number)
            try:
                if self._calls and (names := self._calls.keys() & await in_thread(self._journal.offered)):
                    for task in await in_thread(self._journal.next_tasks, list(names)):
                        if task is not None:
                            self._tell(task)
            except Unwritable:  # the gateway says so, once
                await asyncio.sleep(AGAIN_S)
                number = -1  # what was not read is still to be told

    def _tell(self, task: Row) -> None:
        for call in self._calls.get(task.site, ()):
            if not call.done():
                call.set_result(task)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            for calls in self._calls.values():
                for call, site in calls.items():
                    self._recheck(call, site)
            present, self._heard = self._calls.keys() | self._heard, set()
            with suppress(Unwritable):
                if present:
                    await in_thread(self._journal.see, *present)

    def _recheck(self, call: "asyncio.Future[Row | None]", site: Peer) -> None:
        try:
            self._gate.recheck(site)
        except OffsiteError as error:
            if not call.done():
                call.set_exception(error)
