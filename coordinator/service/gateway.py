"""This gateway among those that share its stores: it says that it is here, and makes sure that all are alike."""

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from importlib.metadata import version
from pathlib import Path

from offsite.coordinator.home import Home
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.service.threads import in_thread
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.gateways import mark
from offsite.coordinator.store.journal import Journal
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json
from offsite.protos.errors import ConflictError

BEAT_S = 5.0
AGAIN_S = 1.0  # after the journal could not be used

log = logging.getLogger(__name__)


class Gateway:
    """One process that serves sites and people, under a name that its home keeps."""

    def __init__(self, home: Home, journal: Journal, blobs: Blobs, *, policy: OwnerPolicy) -> None:
        self.name = _name(home.root / "gateway")
        self._home, self._journal, self._blobs = home, journal, blobs
        self._policy = digest_bytes(to_json(policy))
        self._owner = digest_bytes((home.identity / "owner.pub").read_bytes())

    def join(self, address: str) -> None:
        """Begin to be one of the gateways; raises ConflictError where one of them is unlike this one."""
        for other in self._journal.gateways():
            if other.name != self.name and digest_bytes(mark(other.name)) not in self._blobs:
                raise ConflictError(
                    f"gateway {other.name} at {other.address} works on this journal with other blobs; name the same "
                    "with --blobs, in a bucket unless both are on one machine"
                )
        file = self._home.node.scratch / f"mark-{self.name}"
        file.write_bytes(mark(self.name))
        self._blobs.take(file)
        self._announce(address=address, version=version("offsite"), started_at=time.time())

    def _announce(self, **about: str | float) -> None:
        self._journal.announce(self.name, policy=self._policy, owner=self._owner, **about)

    async def work(self) -> None:
        """Go on saying that it is here; raises ConflictError where one that is unlike it has come.

        So it finds out when the journal cannot be used, and logs that for all of this process: when it begins, and when
        it is over.
        """
        away: float | None = None  # since when
        while True:
            await asyncio.sleep(BEAT_S if away is None else AGAIN_S)
            try:
                await in_thread(self._announce)
                if away is not None:
                    log.warning("the journal can be used again, after %.0f s", time.monotonic() - away)
                away = None
            except Unwritable as error:
                if away is None:
                    away = time.monotonic()
                    log.error("%s; the runs go on once that is done", error)

    def leave(self) -> None:
        """Be no longer one of them."""
        with contextlib.suppress(Unwritable):
            self._journal.leave(self.name)


def _name(file: Path) -> str:
    """Return the name in a file; made if missing."""
    if not file.exists():
        partial = file.with_name(f"{file.name}.new")
        partial.write_text(f"{socket.gethostname()[:64]}-{secrets.token_hex(4)}")
        partial.replace(file)
    return file.read_text()
