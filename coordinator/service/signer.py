"""The authority at work beside a gateway: it answers what is asked at any of them."""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from offsite.coordinator.service.threads import in_thread
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal, Row
from offsite.coordinator.store.memberships import Decision
from offsite.protos.errors import IdentityError, OffsiteError
from offsite.protos.security.pki import Authority
from offsite.protos.security.revocation import WARNING_DAYS

BATCH = 256
REST_S = 0.2  # between two looks
LIST_S = 3600.0  # between two looks whether the list ends soon
AGAIN_S = 2.0  # after the journal or the authority's folder could not be used

log = logging.getLogger(__name__)


class Signer:
    """Answers requests with an authority's key, and renews its list before that ends."""

    def __init__(self, folder: Path, journal: Journal, *, kit: Path) -> None:
        """Open the authority in a folder; raises IdentityError for another than the one that made the kit."""
        self._authority, self._journal = Authority.open(folder), journal
        if (folder / "ca.crt").read_bytes() != (kit / "ca.crt").read_bytes():
            raise IdentityError(f"--authority {folder}: another authority than the one that made the kit {kit}")

    async def work(self, changes: Changes) -> None:
        """Answer what is asked, until cancelled."""
        number, renewed = -1, float("-inf")
        while True:
            number = await changes.after(number, timeout_s=LIST_S)
            try:
                if time.monotonic() - renewed > LIST_S:
                    await in_thread(self._renew_list)
                    renewed = time.monotonic()
                while rows := await in_thread(self._journal.unsigned, most=BATCH):
                    await in_thread(self._answer, rows)
                await asyncio.sleep(REST_S)
            except (OffsiteError, OSError) as error:
                if not isinstance(error, Unwritable):  # of which the gateway speaks
                    log.error("certificates that are asked for are not signed: %s", error)
                number = -1
                await asyncio.sleep(AGAIN_S)

    def _answer(self, rows: list[Row]) -> None:
        answers = self._authority.sign([(int(row.caller, 16), row.request) for row in rows])
        decisions = [
            Decision(row.caller, row.key, answer.certificate, answer.refusal)
            for row, answer in zip(rows, answers, strict=True)
        ]
        newest = self._authority.newest()
        self._journal.decide(decisions, number=newest.number, pem=newest.pem)
        for one in decisions:
            if one.refusal:
                log.warning("a certificate was asked for and refused: %s", one.refusal)

    def _renew_list(self) -> None:
        if self._authority.newest().until - datetime.now(UTC) < timedelta(days=WARNING_DAYS):
            self._authority.refresh()
