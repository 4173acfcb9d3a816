"""The coordinator's own certificate: shown as the kit has it at each handshake, and renewed in time."""

import asyncio
import logging
from datetime import UTC, datetime
from pathlib import Path

from offsite.coordinator.service.threads import in_thread
from offsite.protos.errors import IdentityError, OffsiteError
from offsite.protos.security.identity import Identity
from offsite.protos.security.kit import CERTIFICATE, KEY, next_key, replace_pair, stamp
from offsite.protos.security.pki import Authority

LOOK_S = 3600.0  # between two looks whether it is to be renewed

log = logging.getLogger(__name__)


class OwnCertificate:
    """A kit that may be written anew while it is used, by hand or by itself."""

    def __init__(self, kit: Path, *, authority: Path | None) -> None:
        """Read the kit; raises IdentityError, and NotFoundError for a folder without an authority."""
        self._stamps = _stamps(kit)
        self.identity = Identity.load(kit, expect="coordinator")
        self._authority = Authority.open(authority) if authority else None
        self._said = ""  # what hindered, or was to be warned of, as it was logged last

    def newest(self) -> Identity:
        """Return what the kit has now, or had before if that cannot be used. Threads of gRPC's ask."""
        stamps = _stamps(self.identity.folder)
        if stamps == self._stamps:
            return self.identity
        try:
            identity = Identity.load(self.identity.folder, expect="coordinator")
            if identity.authority != self.identity.authority:
                raise IdentityError(f"{identity.folder}: now a kit of another authority; start the coordinator again")
        except IdentityError as error:
            self._say(f"the certificate that was shown before is shown on: {error}")
        else:
            if identity.certificate != self.identity.certificate:
                log.info("another certificate of %s is shown, until %s", identity.name, f"{identity.expires:%F}")
            self.identity, self._stamps = identity, stamps
        return self.identity

    def renew(self) -> None:
        """Renew it if it is time and the authority is beside, else warn before it ends; raises OffsiteError."""
        own = self.newest()
        if self._authority is None:
            if own.warning:
                self._say(own.warning)
        elif datetime.now(UTC) >= own.renewal:
            key = next_key(own.folder).public_key()
            replace_pair(own.folder, self._authority.recertify(own.certificate, key))
            self.newest()

    async def work(self) -> None:
        """Look now and then."""
        while True:
            try:
                await in_thread(self.renew)
            except (OffsiteError, OSError) as error:
                ends = f"{self.identity.expires:%F}"
                self._say(f"the coordinator's certificate, which ends on {ends}, is not renewed: {error}")
            await asyncio.sleep(LOOK_S)

    def _say(self, words: str) -> None:
        if words != self._said:
            log.warning("%s", words)
        self._said = words


def _stamps(kit: Path) -> list[tuple[int, int, int] | None]:
    return [stamp(kit / name) for name in (CERTIFICATE, KEY)]
