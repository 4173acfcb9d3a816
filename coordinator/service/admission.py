"""Who is let in: the list of certificates, kept up to date, the calls that add to it, and an authority beside it."""

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from offsite.coordinator.home import Home
from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.lists import Lists
from offsite.coordinator.service.membership import MembershipService
from offsite.coordinator.service.meter import Meter
from offsite.coordinator.service.signer import Signer
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.journal import Journal
from offsite.protos.membership_pb2_grpc import add_MembershipServicer_to_server
from offsite.protos.security.revocation import Revocations


class Admission:
    """The gate of one gateway, and what keeps it up to date."""

    def __init__(self, home: Home, journal: Journal, *, authority: Path | None, meter: Meter) -> None:
        """Read the lists that are here; raises IdentityError, and NotFoundError for a folder without an authority."""
        self._journal = journal
        received = home.root / "crl.pem"
        others = (received, authority / "crl.pem") if authority else (received,)
        self._revocations = Revocations(home.identity / "crl.pem", *others, seen=home.crl_seen)
        self._ca = (home.identity / "ca.crt").read_bytes()
        self._lists = Lists(self._revocations, journal, received=received, authority=self._ca)
        self.gate = Gate(self._revocations, look=self._lists.look, meter=meter)
        self._signer = Signer(authority, journal, kit=home.identity) if authority else None

    def serve(self, server: Any, changes: Changes) -> None:
        """Add the Membership service to a server."""
        service = MembershipService(self._journal, self.gate, changes, self._revocations, authority=self._ca)
        add_MembershipServicer_to_server(service, server)  # type: ignore[no-untyped-call]

    def jobs(self, changes: Changes) -> list[Coroutine[Any, Any, None]]:
        """Return what is to be done as long as the server runs."""
        return [self._lists.work(), *([self._signer.work(changes)] if self._signer else [])]
