"""When the journal changes, whoever waits for that is woken: a signal within this process, a look for all others.

Supervisors write from processes of their own. One look for the whole server, some microseconds twenty times a second,
finds what they wrote; nobody else polls. Where the database is a server, it has told us by then.
"""

import asyncio
import contextlib

from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal

LOOK_S = 0.05  # for what other processes write
REST_S = 0.02  # after a change: writers that write without pause wake nobody more often
AGAIN_S = 1.0  # after the journal could not be read


class Changes:
    """Counts the moments at which the journal was found changed.

    Who waits takes the number first, then looks into the journal, then waits for another number: what is written
    between the look and the wait has made the number another one, so no change is missed.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.number = 0
        self._next = asyncio.Event()  # set once the number is another one
        self._written = asyncio.Event()

    async def after(self, number: int, *, timeout_s: float | None = None) -> int:
        """Wait until the number is another one, or for so long; return the number."""
        if self.number == number:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._next.wait()
        return self.number

    async def follow(self) -> None:
        """Look again and again; raises when the journal is damaged."""
        loop = asyncio.get_running_loop()
        watch = self._journal.watch(lambda: loop.call_soon_threadsafe(self._written.set))
        try:
            while True:
                self._written.clear()
                try:
                    if watch.changed():
                        self._wake()
                        await asyncio.sleep(REST_S)
                except Unwritable:  # the gateway says so, once
                    await asyncio.sleep(AGAIN_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._written.wait()
        finally:
            watch.close()

    def _wake(self) -> None:
        self.number += 1
        self._next.set()
        self._next = asyncio.Event()
