"""One's own kit, checked when it is read rather than when a handshake fails far away."""

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from offsite.protos.errors import IdentityError
from offsite.protos.security import kit
from offsite.protos.security.certificates import MEMBERS, ROLES, UNREADABLE, Role, either, subject

WARNING_DAYS = 14


@dataclass(frozen=True)
class Identity:
    """Who this process is: a kit whose parts belong together and hold now."""

    role: Role
    name: str
    begins: datetime
    expires: datetime
    folder: Path
    certificate: bytes = field(repr=False)  # PEM, as checked: a later change on disk is not picked up unchecked
    key: bytes = field(repr=False)
    authority: bytes = field(repr=False)

    @classmethod
    def load(cls, folder: Path, *, expect: Role | tuple[Role, ...] = ROLES) -> Self:
        """Read a kit of an expected role and check it; raises IdentityError that names the file and what to do."""
        with kit.pair(folder) as (certificate_file, key_file):
            pair = _read(certificate_file), _read(key_file)
        authority = _read(folder / "ca.crt")
        _read(folder / "owner.pub")
        own = cls.of(folder, *pair, authority, expect=expect)
        for file in ("owner.key", "crl.pem") if own.role == "coordinator" else ("crl.pem",):
            _read(folder / file)
        return own

    @classmethod
    def of(
        cls, folder: Path, pem: bytes, key: bytes, authority: bytes, *, expect: Role | tuple[Role, ...] = ROLES
    ) -> Self:
        """Check a certificate, the key to it and the authority that issued it, all PEM; raises IdentityError."""
        certificate = _certificate(folder / "tls.crt", pem)
        _check_key(folder / "tls.key", key, certificate)
        _check_issuer(folder / "tls.crt", certificate, _certificate(folder / "ca.crt", authority))
        try:
            role, name = subject(certificate)
        except IdentityError as error:
            raise IdentityError(f"{folder / 'tls.crt'}: {error}") from None
        _check_dates(folder / "tls.crt", certificate, f"{role} {name!r}")
        roles = (expect,) if isinstance(expect, str) else expect
        if role not in roles:
            raise IdentityError(
                f"{folder}: this is the kit of {role} {name!r}, but one of role "
                f"{either(roles)} is needed here; use another kit"
            )
        begins, expires = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return cls(role, name, begins, expires, folder, pem, key, authority)

    @property
    def about(self) -> dict[str, str]:
        """Whose kit it is, where, and until when it holds, as commands say it to programs."""
        about = {"role": self.role, "name": self.name, "expires": self.expires.isoformat()}
        return about | {"identity": str(self.folder)}

    @property
    def renewal(self) -> datetime:
        """When the certificate is to be renewed: with a third of its life left."""
        return self.expires - (self.expires - self.begins) / 3

    @property
    def warning(self) -> str | None:
        """Say that the certificate ends within two weeks; None while there is time, or it will be renewed in time."""
        left = self.expires - datetime.now(UTC)
        renewed = self.role in MEMBERS and datetime.now(UTC) < self.renewal + (self.expires - self.renewal) / 4
        if left.days >= WARNING_DAYS or renewed:
            return None
        return (
            f"{self.folder / 'tls.crt'}: the certificate of {self.role} {self.name!r} expires on "
            f"{self.expires:%Y-%m-%d}, in {max(left.days, 0)} days, and was not renewed; ask the model owner"
        )


def _read(path: Path) -> bytes:
    try:
        if path.suffix == ".key" and os.name == "posix" and path.stat().st_mode & 0o077:
            raise IdentityError(
                f"{path}: others on this machine may use this key (mode {path.stat().st_mode & 0o777:o}); "
                f"run `chmod 600 {path}`, and ask for a new kit if somebody may have read it"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise IdentityError(
            f"{path}: no such file; name the folder of a whole kit, as `offsite pki issue` wrote it"
        ) from None
    except OSError as error:
        raise IdentityError(
            f"{path}: cannot be read: {error.strerror}; give this account the right to read its kit"
        ) from None


def _certificate(path: Path, data: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(data)
    except UNREADABLE:
        raise IdentityError(f"{path}: not a certificate in PEM form; copy the kit again from the model owner") from None


def _check_key(path: Path, data: bytes, certificate: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(data, password=None)
    except UNREADABLE:
        raise IdentityError(
            f"{path}: not an unencrypted private key in PEM form; copy the kit again from the model owner"
        ) from None
    if key.public_key() != certificate.public_key():
        raise IdentityError(f"{path}: the key does not belong to tls.crt; take both from the same kit")


def _check_issuer(path: Path, certificate: x509.Certificate, authority: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise IdentityError(
            f"{path}: the certificate was not issued by this kit's ca.crt; take both from the same kit"
        ) from None


def _check_dates(path: Path, certificate: x509.Certificate, whose: str) -> None:
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        raise IdentityError(
            f"{path}: the certificate of {whose} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask the model "
            "owner for a token, and join again with `offsite identity enrol`, or for a kit of `offsite pki issue`"
        )
    if certificate.not_valid_before_utc > now:
        raise IdentityError(
            f"{path}: the certificate of {whose} is not valid before "
            f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; check this machine's clock "
            f"({now:%Y-%m-%d %H:%M} UTC)"
        )
