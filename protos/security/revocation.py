"""Who is let in: the authority's list of the certificates that it has issued, and of those that no longer hold.

The list is an X.509 revocation list, `crl.pem` in every kit. An extension of it names the serial numbers of all
certificates issued, so one document with one signature, one number and one date says both.
"""

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from offsite.protos.errors import IdentityError, ResourceError
from offsite.protos.security.certificates import BACKDATED, UNREADABLE, Issuer, Peer, authority_key_identifier
from offsite.protos.security.kit import stamp, write

log = logging.getLogger(__name__)

GRACE_S = 60.0  # for which a list that was read before stands in for a file that is half written
WARNING_DAYS = 14
_ISSUED = x509.ObjectIdentifier("2.25.179418304219503018237126049181254719402")  # drawn at random: nobody else's
_SERIAL_BYTES = 20
_RENEW = "renew it with `offsite pki refresh` and copy crl.pem from the authority's folder into the kit"


def new_revocation_list(
    issuer: Issuer,
    *,
    number: int,
    issued: Iterable[int],
    revoked: Iterable[tuple[int, datetime]],
    now: datetime,
    until: datetime,
) -> x509.CertificateRevocationList:
    """List the serial numbers issued, and those revoked with the moment; a larger number replaces a smaller one."""
    entries = [
        x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment).build()
        for serial, moment in revoked
    ]
    serials = b"".join(serial.to_bytes(_SERIAL_BYTES) for serial in issued)
    return (
        x509.CertificateRevocationListBuilder(revoked_certificates=entries)
        .issuer_name(issuer.certificate.subject)
        .last_update(now - BACKDATED)
        .next_update(min(until, issuer.certificate.not_valid_after_utc))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(authority_key_identifier(issuer), critical=False)
        .add_extension(x509.UnrecognizedExtension(_ISSUED, serials), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )


class Unlisted(IdentityError):
    """A certificate that a list has no record of; a newer list may have."""


@dataclass(frozen=True)
class RevocationList:
    """A list, read and found to be signed by the authority."""

    number: int
    since: datetime
    until: datetime
    issued: frozenset[int]
    revoked: frozenset[int]
    pem: bytes = field(repr=False, default=b"")

    @classmethod
    def parse(cls, data: bytes, authority: bytes, *, where: Path) -> "RevocationList":
        """Read a list (PEM) of an authority (PEM certificate); raises IdentityError."""
        try:
            key = x509.load_pem_x509_certificate(authority).public_key()
            crl = x509.load_pem_x509_crl(data)
            signed = isinstance(key, ec.EllipticCurvePublicKey) and crl.is_signature_valid(key)
        except UNREADABLE:
            signed = False
        if not signed:
            raise IdentityError(
                f"{where}: not a revocation list signed by the kit's ca.crt; copy crl.pem again from the "
                "authority's folder"
            )
        try:
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            serials = crl.extensions.get_extension_for_oid(_ISSUED).value
        except x509.ExtensionNotFound:
            raise IdentityError(f"{where}: the list does not name the certificates issued; {_RENEW}") from None
        assert isinstance(serials, x509.UnrecognizedExtension)
        numbers = [serials.value[at : at + _SERIAL_BYTES] for at in range(0, len(serials.value), _SERIAL_BYTES)]
        until = crl.next_update_utc or datetime.min.replace(tzinfo=UTC)
        issued = frozenset(int.from_bytes(one) for one in numbers)
        revoked = frozenset(entry.serial_number for entry in crl)
        return cls(number, crl.last_update_utc, until, issued, revoked, data)

    def check(self, peer: Peer, *, where: Path) -> None:
        """Refuse a certificate that is revoked, or that the authority has no record of; raises IdentityError."""
        if peer.serial in self.revoked:
            raise IdentityError(
                f"the certificate of {peer.role} {peer.name!r} is revoked; ask the model owner for a token, and join "
                "again"
            )
        if peer.serial not in self.issued:
            raise Unlisted(
                f"the certificate of {peer.role} {peer.name!r} is not among those that {where} names: was it issued "
                "after that list was copied, copy crl.pem again from the authority's folder into this kit"
            )

    def check_coordinator(self, certificate: x509.Certificate, *, where: Path) -> None:
        """Refuse a coordinator that is revoked, or that a list newer than its certificate has no record of.

        A client's list is as old as its kit: it may know nothing of a certificate that was renewed since, and its end
        locks nobody out. Raises IdentityError.
        """
        peer, since = Peer.of(certificate), certificate.not_valid_before_utc
        if peer.serial in self.revoked:
            raise IdentityError(
                f"the certificate of {peer.role} {peer.name!r} is revoked, by {where}; "
                "ask the model owner where the coordinator is now"
            )
        if peer.serial not in self.issued and since < self.since:
            raise IdentityError(
                f"the certificate of {peer.role} {peer.name!r} is not among those that {where} names, which is newer; "
                "tell the model owner, somebody else may hold the authority's key"
            )


def replace_list(kit: Path, pem: bytes) -> None:
    """Put a list (PEM) into a kit, unless the one there is as new; raises IdentityError, and InputError for a disk."""
    path, authority = kit / "crl.pem", (kit / "ca.crt").read_bytes()
    if RevocationList.parse(pem, authority, where=path).number > list_number(kit):
        write(path, pem)


def list_number(kit: Path) -> int:
    """Return the number of a kit's list; 0 for one that is damaged, which any other is better than."""
    path = kit / "crl.pem"
    try:
        return RevocationList.parse(path.read_bytes(), (kit / "ca.crt").read_bytes(), where=path).number
    except (OSError, IdentityError):
        return 0


class Revocations:
    """The list in a kit, read again whenever the file changes; an older one is never taken for a newer one.

    Other places may hold a newer one, which then counts.
    """

    def __init__(self, path: Path, *others: Path, seen: Path | None = None) -> None:
        """Read the list; `seen` is where the highest number that was read is kept. Raises IdentityError."""
        self._path, self._others, self._seen = path, others, seen
        self._highest = _number(seen) if seen else 0
        self._version: list[tuple[int, int, int] | None] = []
        self._broken_since: float | None = None
        self._warned = float("-inf")
        self._list = self._read()

    def newest(self) -> RevocationList:
        """Return the newest list that there is."""
        self._refresh()
        return self._list

    def check(self, peer: Peer) -> None:
        """Refuse a peer whose certificate does not hold: IdentityError; or every one, without a list: ResourceError."""
        self._refresh()
        left = self._list.until - datetime.now(UTC)
        if left <= timedelta(0):
            raise ResourceError(f"{self._path} ended on {self._list.until:%Y-%m-%d}, so nobody is let in; {_RENEW}")
        if left.days < WARNING_DAYS and time.monotonic() - self._warned > 86_400:
            self._warned = time.monotonic()
            log.warning("%s ends on %s, and then nobody is let in; %s", self._path, f"{self._list.until:%F}", _RENEW)
        peer.check_date()
        self._list.check(peer, where=self._path)

    def _refresh(self) -> None:
        try:
            if self._stamp() != self._version or self._broken_since is not None:
                self._list = self._read()
                self._broken_since = None
        except IdentityError as error:
            self._broken_since = self._broken_since or time.monotonic()
            if time.monotonic() - self._broken_since > GRACE_S:
                raise ResourceError(f"{error}; nobody is let in until then") from None

    def _stamp(self) -> list[tuple[int, int, int] | None]:
        return [stamp(path) for path in (self._path, *self._others)]

    def _read(self) -> RevocationList:
        self._version = self._stamp()
        try:
            data, authority = self._path.read_bytes(), self._path.with_name("ca.crt").read_bytes()
        except OSError as error:
            raise IdentityError(f"{error.filename}: cannot be read: {error.strerror}") from None
        revocations = RevocationList.parse(data, authority, where=self._path)
        for path in self._others:
            with suppress(OSError, IdentityError):  # none yet, or of another authority than the kit is of now
                other = RevocationList.parse(path.read_bytes(), authority, where=path)
                revocations = max(revocations, other, key=lambda one: one.number)
        if revocations.number < self._highest:
            raise IdentityError(
                f"{self._path}: an older list than one that was used before (number {revocations.number} after "
                f"{self._highest}); copy the newest crl.pem from the authority's folder"
            )
        if revocations.number > self._highest and self._seen:
            write(self._seen, str(revocations.number).encode(), secret=True)
        self._highest = revocations.number
        return revocations


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError):
        raise IdentityError(
            f"{path}: cannot be read, so an older revocation list could not be told from a newer one; "
            "remove the file if crl.pem is the newest"
        ) from None
