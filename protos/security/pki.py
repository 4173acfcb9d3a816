"""The authority: one folder in the model owner's hands that says who takes part.

It issues *kits*. A kit is a folder with all one party needs to prove who it is and to know the others:

    tls.crt, tls.key    its certificate and the key to it         every kit
    ca.crt              the authority, to check the other end     every kit
    owner.pub           to check the model owner's signatures     every kit
    owner.key           to make them                              the coordinator's kit
    crl.pem             all certificates issued, and which no     every kit
                        longer hold

Or it makes *tokens*: whoever has one makes a key, and has it certified here. Names, roles and lifetimes are in this
folder alone; of what is asked for, only the key counts.
"""

import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from offsite.protos.addresses import parse_all
from offsite.protos.errors import ConflictError, IdentityError, InputError, NotFoundError, OffsiteError, RefusedError
from offsite.protos.security.certificates import MEMBERS, ROLES, Role, check_name, either, hosts_of, new_certificate
from offsite.protos.security.index import Entry, Invitation, Ledger
from offsite.protos.security.kit import private, write
from offsite.protos.security.register import FILES, LIST_DAYS, Register, check_days, now
from offsite.protos.security.signing_requests import fingerprint, requested_key
from offsite.protos.security.tokens import Token

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
TOKEN_HOURS, JOINED_DAYS = 24, 30


class Answer(NamedTuple):
    """What the authority says to one who asks for a certificate."""

    certificate: bytes  # PEM; empty where it refuses
    refusal: str  # a sentence
    whose: str  # the role and the name certified


class Authority(Register):
    """The certificate authority and the model owner's signing key, kept in one folder."""

    def issue(
        self, role: Role, name: str, *, hosts: Sequence[str] = (), days: int = 365, _at: datetime | None = None
    ) -> Path:
        """Issue a certificate and return the kit's folder, named for it; a revoked or expired kit there is replaced.

        `hosts` are the DNS names and addresses the coordinator is reached at. Raises InputError for an argument,
        ConflictError while the name has a valid certificate, IdentityError once the authority itself has expired.
        """
        _check_request(role, name, hosts=hosts, days=days)
        with self.locked():
            self._check_free(self.ledger(), name)
            return self._issue(role, name, hosts or (LOCAL_HOSTS if role == "coordinator" else ()), days=days, at=_at)

    def renew(self, name: str, *, days: int = 365) -> Path:
        """Issue a new key and certificate to a name whose kit lies in this folder, and return the kit.

        The one before holds until it ends, so that a coordinator that uses it has time to be given the new kit.
        Raises NotFoundError where the name has no valid certificate, or its kit is elsewhere.
        """
        check_days(days)
        with self.locked():
            entry = next((one for one in self.ledger().of(name) if isinstance(one, Entry)), None)
            try:
                old = x509.load_pem_x509_certificate((self.folder / name / "tls.crt").read_bytes())
            except (OSError, ValueError):
                old = None
            if entry is None or old is None:
                raise NotFoundError(
                    f"{self.folder}: no kit of {name!r} in it whose certificate is valid; who joined by a token renews "
                    "by itself, all others get a new kit with `offsite pki issue`"
                )
            return self._issue(entry.role, name, hosts_of(old), days=days)

    def token(self, role: Role, name: str, *, address: str, hours: int = TOKEN_HOURS, days: int = JOINED_DAYS) -> Token:
        """Make a token by which one party joins, with a key of its own; earlier ones for the name hold no longer.

        `address` is HOST:PORT of the coordinator, or of several gateways to it, with commas; `days` is how long the
        party's certificates hold. Raises InputError for an argument, ConflictError while the name has a valid one.
        """
        return self.tokens(role, [name], address=address, hours=hours, days=days)[0]

    def tokens(
        self, role: Role, names: Sequence[str], *, address: str, hours: int = TOKEN_HOURS, days: int = JOINED_DAYS
    ) -> list[Token]:
        """Make a token for each of some names, or for none if one of them can have none; see `token`."""
        if role not in MEMBERS:
            raise InputError(
                f"a {role} does not join by a token, expected {either(MEMBERS)}: a coordinator's kit holds the model "
                "owner's key, and is made with `offsite pki issue`"
            )
        for name in names:
            _check_request(role, name, hosts=(), days=days)
        twice = [name for name, count in Counter(name.casefold() for name in names).items() if count > 1]
        if twice:
            raise InputError(f"{twice[0]!r} is named twice; name each once, whatever its case")
        if not 1 <= hours <= 24 * 365:
            raise InputError(f"hours must be in 1..8760, got {hours}")
        parse_all(address)
        with self.locked():
            ledger = self.ledger()
            start, end = self.life(now(), timedelta(hours=hours))
            pairs = []
            for name in names:
                self._check_free(ledger, name)
                key = ec.generate_private_key(ec.SECP256R1())
                certificate = new_certificate(self.issuer, key.public_key(), "joining", name, start=start, end=end)
                earlier = [replace(one, revoked_at=start) for one in ledger.of(name) if isinstance(one, Invitation)]
                serial = f"{certificate.serial_number:x}"
                ledger.put(*earlier, Invitation(serial=serial, role=role, name=name, expires=end, days=days))
                pairs.append({"tls.crt": certificate.public_bytes(Encoding.PEM), "tls.key": private(key)})
            self.keep(ledger)
            files = {file: (self.folder / file).read_bytes() for file in ("ca.crt", "owner.pub")}
            files["crl.pem"] = self.coordinators()
            return [Token(address, role, name, end, files | pair) for name, pair in zip(names, pairs, strict=True)]

    def sign(self, requests: Sequence[tuple[int, bytes]]) -> list[Answer]:
        """Answer signing requests, each with the serial number of the certificate that it came with.

        One who asks again for the same key is answered alike. Every certificate is on the list once this returns.
        """
        with self.locked():
            ledger, before = self.ledger(), self.index()
            answers = []
            for serial, request in requests:
                try:
                    answer = self._sign(ledger, f"{serial:x}", request)
                except OffsiteError as error:
                    if isinstance(error, _Contested):
                        ledger.put(error.asker)
                    answer = Answer(b"", str(error), "")
                answers.append(answer)
            if ledger.index() != before:
                self.keep(ledger)
            return answers

    def _sign(self, ledger: Ledger, serial: str, request: bytes) -> Answer:
        """Certify a key for whoever has a token or a certificate."""
        key = requested_key(request)
        asker, entry = ledger.asker(serial), ledger.answer(serial)
        if asker is None or asker.role == "coordinator":
            raise RefusedError("this authority has made no token or certificate that this may be asked for with")
        whose = f"{asker.role} {asker.name!r}"
        if asker.revoked_at is not None or (entry is not None and entry.revoked_at is not None):
            raise IdentityError(f"what {whose} holds is revoked; ask the model owner for a new token")
        if entry is not None and entry.key != fingerprint(key):
            raise _Contested(replace(asker, contested_at=now()), whose)
        start, end = self.life(now(), _days(asker))
        if asker.expires <= start:
            raise IdentityError(f"what {whose} holds has expired; ask the model owner for a new token")
        if entry is None:
            if isinstance(asker, Invitation):
                self._check_free(ledger, asker.name)
                ledger.put(replace(asker, used_at=start))
            entry = _entry(asker, key, start, end)
            ledger.put(entry)
        return Answer(self._certify(entry, key), "", whose)

    def recertify(self, certificate: bytes, key: ec.EllipticCurvePublicKey) -> bytes:
        """Certify another key for a coordinator whose certificate (PEM) holds, with its hosts and for as long.

        Each key gets one of its own, as several gateways may have copies of one kit, and the same key the same one.
        Raises RefusedError for a certificate that was made for nobody's coordinator, IdentityError for one that has
        ended or is revoked.
        """
        old = x509.load_pem_x509_certificate(certificate)
        with self.locked():
            ledger = self.ledger()
            before, entry = ledger.asker(f"{old.serial_number:x}"), ledger.answer(f"{old.serial_number:x}")
            if not isinstance(before, Entry) or before.role != "coordinator":
                raise RefusedError(f"{self.folder}: this authority has made no such certificate for a coordinator")
            if before.status != "valid":
                raise IdentityError(f"the certificate of coordinator {before.name!r} is {before.status}; issue a kit")
            if entry is None or entry.key != fingerprint(key):
                start, end = self.life(now(), _days(before))
                entry = _entry(before, key, start, end)
                ledger.put(entry)
                self.keep(ledger)
            return self._certify(entry, key, hosts_of(old))

    def _certify(self, entry: Entry, key: ec.EllipticCurvePublicKey, hosts: Sequence[str] = ()) -> bytes:
        """Return the certificate (PEM) of an entry, the same whenever it is asked for."""
        assert entry.issued_at is not None, "whoever asks for one is certified by a version that writes it down"
        return new_certificate(
            self.issuer,
            key,
            entry.role,
            entry.name,
            hosts=hosts,
            serial=int(entry.serial, 16),
            start=entry.issued_at,
            end=entry.expires,
        ).public_bytes(Encoding.PEM)

    def revoke(self, name: str) -> tuple[Path, ...]:
        """Revoke all that holds of a name and return the lists written: the authority's and those of its kits.

        These are its certificates and its open tokens. Raises NotFoundError where there is none.
        """
        with self.locked():
            ledger = self.ledger()
            if not (held := ledger.of(name)):
                valid = {entry.name for entry in self.entries() if entry.status == "valid"}
                known = ", ".join(sorted(valid)) or "none"
                raise NotFoundError(f"{self.folder}: no valid certificate of {name!r} to revoke (valid: {known})")
            used = [
                one for one in ledger.alike(name) if one.name == name and one.status == "used"
            ]  # give nothing again
            ledger.put(*(replace(one, revoked_at=now()) for one in (*held, *used)))
            lists = self.publish(ledger.index())
            self.remember(ledger.index())  # last: a revocation that was cut short can then be asked for again
            return lists

    def refresh(self, *, days: int = LIST_DAYS) -> tuple[Path, ...]:
        """Write the list of certificates again, to hold for so many days, and return where."""
        check_days(days)
        with self.locked():
            return self.publish(self.index(), days=days)

    def _issue(self, role: Role, name: str, hosts: Sequence[str], *, days: int, at: datetime | None = None) -> Path:
        start, end = self.life(at or now(), timedelta(days=days))
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = new_certificate(self.issuer, key.public_key(), role, name, hosts=hosts, start=start, end=end)
        serial = f"{certificate.serial_number:x}"
        ledger = self.ledger()
        ledger.put(Entry(serial=serial, role=role, name=name, issued_at=start, expires=end))
        self.keep(ledger)
        return self._write_kit(role, name, certificate.public_bytes(Encoding.PEM), private(key))

    def _check_free(self, ledger: Ledger, name: str) -> None:
        # Names that differ only in case share a folder on some file systems.
        same = [entry for entry in ledger.alike(name) if isinstance(entry, Entry)]
        for entry in same:
            if entry.status == "valid":
                raise ConflictError(
                    f"{entry.role} {entry.name!r} has a certificate that is valid until {entry.expires:%Y-%m-%d}; "
                    f"revoke it first with `offsite pki revoke {self.folder} {entry.name}`"
                )
        if not same and (self.folder / name).exists():
            raise ConflictError(f"{self.folder / name}: exists and is not a kit; choose another name or move it away")

    def _write_kit(self, role: Role, name: str, certificate: bytes, key: bytes) -> Path:
        kit = self.folder / name
        draft = self.folder / f".{name}.{secrets.token_hex(4)}"  # a kit is whole or not there
        write(draft / "tls.crt", certificate)
        write(draft / "tls.key", key, secret=True)
        for file in ("ca.crt", "owner.pub", "crl.pem", *(("owner.key",) if role == "coordinator" else ())):
            write(draft / file, (self.folder / file).read_bytes(), secret=file == "owner.key")
        if kit.exists():
            shutil.rmtree(kit)
        draft.replace(kit)
        return kit


class _Contested(RefusedError):
    """A token or a certificate that was used before, for another key."""

    def __init__(self, asker: Entry | Invitation, whose: str) -> None:
        what = "token" if isinstance(asker, Invitation) else "certificate"
        super().__init__(
            f"this {what} of {whose} was used before, for another key, so somebody else may hold it; tell the model "
            f"owner, who revokes {asker.name!r} and makes a new token"
        )
        self.asker = asker


def _days(asker: Entry | Invitation) -> timedelta:
    """Return how long the certificate holds that one asks for: as the token says, then as long as the one before."""
    if isinstance(asker, Invitation):
        return timedelta(days=asker.days)
    return asker.expires - asker.issued_at if asker.issued_at else timedelta(days=JOINED_DAYS)


def _entry(asker: Entry | Invitation, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime) -> Entry:
    """Return what the index has of a certificate for who asks for it by a token, or by the certificate before."""
    return Entry(
        serial=f"{x509.random_serial_number():x}",
        role=asker.role,
        name=asker.name,
        issued_at=start,
        expires=end,
        asked_by=asker.serial,
        key=fingerprint(key),
    )


def _check_request(role: str, name: str, *, hosts: Sequence[str], days: int) -> None:
    if role not in ROLES:
        raise InputError(f"{role!r} is not a role; roles are {', '.join(ROLES)}")
    check_name(name)
    if name.casefold() in FILES:
        raise InputError(f"{name!r} is the name of one of the authority's own files; choose another name")
    if hosts and role != "coordinator":
        raise InputError(f"a {role} is never dialled, so its certificate holds no hosts; leave them out")
    check_days(days)
