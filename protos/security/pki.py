"""The authority: one folder in the model owner's hands that says who takes part.

It issues *kits*. A kit is a folder with all one party needs to prove who it is and to know the others:

    tls.crt, tls.key    its certificate and the key to it         every kit
    ca.crt              the authority, to check the other end     every kit
    owner.pub           to check the model owner's signatures     every kit
    owner.key           to make them                              the coordinator's kit
    crl.pem             all certificates issued, and which no     every kit
                        longer hold
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from offsite.protos.documents import document, from_json, to_json
from offsite.protos.errors import ConflictError, IdentityError, InputError, NotFoundError
from offsite.protos.security.certificates import ROLES, Issuer, Role, check_name, new_certificate, new_issuer
from offsite.protos.security.revocation import RevocationList, new_revocation_list

FILES = ("ca.crt", "ca.key", "crl.pem", "index.json", "owner.key", "owner.pub")
# A list that is held back can hide a revocation for so long; an owner who is away for longer refreshes it with --days.
LIST_DAYS = 90
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@document
class Entry:
    """One certificate the authority has issued."""

    serial: str  # hexadecimal
    role: Role
    name: str
    expires: datetime
    revoked_at: datetime | None = None

    @property
    def status(self) -> str:
        """`valid`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "valid" if self.expires > datetime.now(UTC) else "expired"


@document
class Index:
    """All certificates the authority has issued, oldest first."""

    certificates: tuple[Entry, ...] = ()


class Authority:
    """The certificate authority and the model owner's signing key, kept in one folder."""

    def __init__(self, folder: Path, issuer: Issuer) -> None:
        """Use `Authority.create` or `Authority.open`."""
        self.folder = folder
        self._issuer = issuer

    @classmethod
    def create(cls, folder: Path, *, name: str = "offsite", days: int = 3650) -> Self:
        """Make a new authority and owner's key; raises ConflictError where the folder holds one already."""
        check_name(name)
        _check_days(days)
        for file in FILES:
            if (folder / file).exists():
                raise ConflictError(
                    f"{folder}: holds an authority already ({file}); it is never overwritten, choose another folder"
                )
        now = datetime.now(UTC).replace(microsecond=0)
        issuer = new_issuer(name, start=now, end=now + timedelta(days=days))
        owner = ed25519.Ed25519PrivateKey.generate()
        _write(folder / "ca.key", _private(issuer.key), secret=True)
        _write(folder / "owner.key", _private(owner), secret=True)
        _write(folder / "owner.pub", owner.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        _write(folder / "index.json", to_json(Index()))
        _write(folder / "ca.crt", issuer.certificate.public_bytes(Encoding.PEM))
        authority = cls(folder, issuer)
        authority.refresh()
        return authority

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read an authority; raises NotFoundError where there is none and IdentityError where its key does not fit."""
        for file in FILES:
            if file != "crl.pem" and not (folder / file).is_file():
                raise NotFoundError(
                    f"{folder}: no authority here, {file} is missing; make one with `offsite pki init {folder}`"
                )
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
        except (ValueError, TypeError):
            raise IdentityError(f"{folder}: ca.crt or ca.key is damaged; restore them from your backup") from None
        except PermissionError as error:
            raise InputError(
                f"{error.filename}: you may not read this file; only the model owner's account may"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise IdentityError(f"{folder}: ca.key does not belong to ca.crt; restore both from your backup")
        return cls(folder, Issuer(certificate, key))

    def entries(self) -> tuple[Entry, ...]:
        """Return all certificates ever issued, oldest first."""
        path = self.folder / "index.json"
        return from_json(Index, path.read_bytes(), where=str(path)).certificates

    def issue(
        self, role: Role, name: str, *, hosts: Sequence[str] = (), days: int = 365, _at: datetime | None = None
    ) -> Path:
        """Issue a certificate and return the kit's folder, named for it; a revoked or expired kit there is replaced.

        `hosts` are the DNS names and addresses the coordinator is reached at. Raises InputError for an argument,
        ConflictError while the name has a valid certificate, IdentityError once the authority itself has expired.
        """
        _check_request(role, name, hosts=hosts, days=days)
        start = _at or datetime.now(UTC).replace(microsecond=0)
        end = min(start + timedelta(days=days), self._issuer.certificate.not_valid_after_utc)
        if end <= start:
            raise IdentityError(
                f"{self.folder / 'ca.crt'}: the authority expired on {end:%Y-%m-%d}; "
                "make a new one with `offsite pki init`"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        names = hosts or (LOCAL_HOSTS if role == "coordinator" else ())
        certificate = new_certificate(self._issuer, key.public_key(), role, name, hosts=names, start=start, end=end)
        entry = Entry(serial=f"{certificate.serial_number:x}", role=role, name=name, expires=end)
        with self._locked():
            self._check_free(name)
            # The index first: a certificate that is not in it could never be revoked.
            entries = (*self.entries(), entry)
            _write(self.folder / "index.json", to_json(Index(certificates=entries)))
            self._publish(entries)
            return self._write_kit(role, name, certificate.public_bytes(Encoding.PEM), _private(key))

    def revoke(self, name: str) -> tuple[Path, ...]:
        """Revoke a name's valid certificate and return the lists written: the authority's and those of its kits.

        Raises NotFoundError where the name has no valid certificate.
        """
        with self._locked():
            now = datetime.now(UTC).replace(microsecond=0)
            entries = self.entries()
            if not any(entry.name == name and entry.status == "valid" for entry in entries):
                known = ", ".join(sorted(entry.name for entry in entries if entry.status == "valid")) or "none"
                raise NotFoundError(f"{self.folder}: no valid certificate of {name!r} to revoke (valid: {known})")
            after = tuple(
                replace(entry, revoked_at=now) if entry.name == name and entry.status == "valid" else entry
                for entry in entries
            )
            lists = self._publish(after)
            # The index last: a revocation that was cut short can then be asked for again.
            _write(self.folder / "index.json", to_json(Index(certificates=after)))
            return lists

    def refresh(self, *, days: int = LIST_DAYS) -> tuple[Path, ...]:
        """Write the list of certificates again, to hold for so many days, and return where."""
        _check_days(days)
        with self._locked():
            return self._publish(self.entries(), days=days)

    def _publish(self, entries: Sequence[Entry], *, days: int = LIST_DAYS) -> tuple[Path, ...]:
        """Write the list of certificates in the authority's folder and in the kits that lie in it."""
        now = datetime.now(UTC).replace(microsecond=0)
        data = new_revocation_list(
            self._issuer,
            number=max(self._number() + 1, int(now.timestamp())),  # the clock's, where the folder is an old backup
            issued=[int(entry.serial, 16) for entry in entries],
            revoked=[(int(entry.serial, 16), entry.revoked_at) for entry in entries if entry.revoked_at is not None],
            now=now,
            until=now + timedelta(days=days),
        ).public_bytes(Encoding.PEM)
        kits = sorted({self.folder / entry.name for entry in entries if (self.folder / entry.name).is_dir()})
        lists = tuple(folder / "crl.pem" for folder in (self.folder, *kits))
        for path in lists:
            _write(path, data)
        return lists

    def _number(self) -> int:
        path = self.folder / "crl.pem"
        try:
            return RevocationList.parse(path.read_bytes(), (self.folder / "ca.crt").read_bytes(), where=path).number
        except (OSError, IdentityError):  # none yet, or of an earlier version
            return 0

    def _check_free(self, name: str) -> None:
        # Names that differ only in case share a folder on some file systems.
        same = [entry for entry in self.entries() if entry.name.casefold() == name.casefold()]
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
        _write(draft / "tls.crt", certificate)
        _write(draft / "tls.key", key, secret=True)
        for file in ("ca.crt", "owner.pub", "crl.pem", *(("owner.key",) if role == "coordinator" else ())):
            _write(draft / file, (self.folder / file).read_bytes(), secret=file == "owner.key")
        if kit.exists():
            shutil.rmtree(kit)
        draft.replace(kit)
        return kit

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time change the folder."""
        with (self.folder / "ca.key").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _check_request(role: str, name: str, *, hosts: Sequence[str], days: int) -> None:
    if role not in ROLES:
        raise InputError(f"{role!r} is not a role; roles are {', '.join(ROLES)}")
    check_name(name)
    if name.casefold() in FILES:
        raise InputError(f"{name!r} is the name of one of the authority's own files; choose another name")
    if hosts and role != "coordinator":
        raise InputError(f"a {role} is never dialled, so its certificate holds no hosts; leave them out")
    _check_days(days)


def _check_days(days: int) -> None:
    if not 1 <= days <= 36500:
        raise InputError(f"days must be in 1..36500, got {days}")


def _private(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file whole or not at all; a secret one is never readable by others, not even for a moment."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
