"""The list of the certificates that hold, carried from where it is newest to every gateway, through the journal."""

import asyncio
import logging
from pathlib import Path

from offsite.coordinator.service.threads import in_thread
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal
from offsite.protos.errors import OffsiteError
from offsite.protos.security.kit import write
from offsite.protos.security.revocation import RevocationList, Revocations

EVERY_S = 2.0
LOOK_S = 3.0  # in which a list that another gateway has is here, too
AGAIN_S = 0.25

log = logging.getLogger(__name__)


class Lists:
    """Gives the journal a newer list than it has, and takes from it a newer one than there is here."""

    def __init__(self, revocations: Revocations, journal: Journal, *, received: Path, authority: bytes) -> None:
        """Take where a list from the journal is put, and the authority (PEM) that signs it."""
        self._revocations, self._journal = revocations, journal
        self._received, self._authority = received, authority
        self._lock = asyncio.Lock()  # of two looks the later one must not be overtaken

    async def exchange(self) -> None:
        """Look once; raises what `Revocations.newest` does, Unwritable, and InputError where the disk is full."""
        async with self._lock:
            await self._exchange()

    async def _exchange(self) -> None:
        here = self._revocations.newest()
        there = await in_thread(self._journal.list_number)
        if here.number > there:
            await in_thread(self._journal.keep_list, here.number, here.pem)
        elif here.number < there:
            pem = await in_thread(self._journal.list_pem)
            RevocationList.parse(pem, self._authority, where=Path("the journal's list"))
            await in_thread(write, self._received, pem)

    async def look(self) -> None:
        """Look for a newer list, which may be on its way; raises what `exchange` does."""
        before, tries = self._revocations.newest().number, int(LOOK_S / AGAIN_S)
        for _ in range(tries):
            await self.exchange()
            if self._revocations.newest().number != before:
                return
            await asyncio.sleep(AGAIN_S)

    async def work(self) -> None:
        """Look again and again."""
        hindrance = ""
        while True:
            try:
                await self.exchange()
                hindrance = ""
            except Unwritable:  # the gateway says so
                pass
            except OffsiteError as error:
                if str(error) != hindrance:
                    log.error("the list of certificates is not exchanged with other gateways: %s", error)
                hindrance = str(error)
            await asyncio.sleep(EVERY_S)
