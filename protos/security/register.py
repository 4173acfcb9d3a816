"""The authority's folder: its key, the index of what it has made, and the list of what holds."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import ConflictError, IdentityError, InputError, NotFoundError
from offsite.protos.security.certificates import Issuer, check_name, new_issuer
from offsite.protos.security.index import Entry, Index, Invitation, Ledger
from offsite.protos.security.kit import private, stamp, write
from offsite.protos.security.revocation import RevocationList, list_number, new_revocation_list

FILES = ("ca.crt", "ca.key", "crl.pem", "index.json", "owner.key", "owner.pub")
# A list that is held back can hide a revocation for so long; an owner who is away for longer refreshes it with --days.
LIST_DAYS = 90
FORGOTTEN = timedelta(days=1)  # after its end a certificate is on no list: nobody lets it in, by its date


class Register:
    """One folder; what changes it is done under its lock."""

    def __init__(self, folder: Path, issuer: Issuer) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self.issuer = issuer
        self._read: tuple[tuple[int, int, int] | None, Index] = None, Index()

    @classmethod
    def create(cls, folder: Path, *, name: str = "offsite", days: int = 3650) -> Self:
        """Make a new authority and owner's key; raises ConflictError where the folder holds one already."""
        check_name(name)
        check_days(days)
        for file in FILES:
            if (folder / file).exists():
                raise ConflictError(
                    f"{folder}: holds an authority already ({file}); it is never overwritten, choose another folder"
                )
        issuer = new_issuer(name, start=now(), end=now() + timedelta(days=days))
        owner = ed25519.Ed25519PrivateKey.generate()
        write(folder / "ca.key", private(issuer.key), secret=True)
        write(folder / "owner.key", private(owner), secret=True)
        write(folder / "owner.pub", owner.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        write(folder / "index.json", to_json(Index()))
        write(folder / "ca.crt", issuer.certificate.public_bytes(Encoding.PEM))
        register = cls(folder, issuer)
        register.publish(Index())
        return register

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
        return self.index().certificates

    def index(self) -> Index:
        """Return all certificates and tokens ever made, oldest first."""
        path = self.folder / "index.json"
        if (now := stamp(path)) is None or now != self._read[0]:
            self._read = now, from_json(Index, path.read_bytes(), where=str(path))
        return self._read[1]

    def ledger(self) -> Ledger:
        """Return the same, to be looked up and added to."""
        return Ledger(self.index())

    def remember(self, index: Index) -> None:
        """Write what was made."""
        path = self.folder / "index.json"
        write(path, to_json(index))
        self._read = stamp(path), index

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time change the folder."""
        with (self.folder / "ca.key").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def life(self, start: datetime, span: timedelta) -> tuple[datetime, datetime]:
        """Return from when to when a certificate holds; raises IdentityError once the authority has expired."""
        end = min(start + span, self.issuer.certificate.not_valid_after_utc)
        if end <= start:
            raise IdentityError(
                f"{self.folder / 'ca.crt'}: the authority expired on {end:%Y-%m-%d}; "
                "make a new one with `offsite pki init`"
            )
        return start, end

    def keep(self, ledger: Ledger) -> None:
        """Remember what was made, then let it in: a certificate that is not in the index could never be revoked."""
        index = ledger.index()
        self.remember(index)
        self.publish(index)

    def publish(self, index: Index, *, days: int = LIST_DAYS) -> tuple[Path, ...]:
        """Write the list of certificates in the authority's folder and in the kits that lie in it."""
        since = now() - FORGOTTEN
        listed = [one for one in index.all if one.expires > since]
        number = max(
            list_number(self.folder) + 1, int(now().timestamp())
        )  # the clock's, where the folder is an old backup
        data = self._list(number, listed, days=days)
        entries = index.certificates
        kits = sorted({self.folder / entry.name for entry in entries if (self.folder / entry.name).is_dir()})
        lists = tuple(folder / "crl.pem" for folder in (self.folder, *kits))
        for path in lists:
            write(path, data)
        return lists

    def coordinators(self) -> bytes:
        """Return the list as far as it is of coordinators: a token is short, and admits nobody by it."""
        return self._list(
            list_number(self.folder), [one for one in self.entries() if one.role == "coordinator"], days=LIST_DAYS
        )

    def _list(self, number: int, entries: Sequence[Entry | Invitation], *, days: int) -> bytes:
        start = now()
        return new_revocation_list(
            self.issuer,
            number=number,
            issued=[int(entry.serial, 16) for entry in entries],
            revoked=[(int(entry.serial, 16), entry.revoked_at) for entry in entries if entry.revoked_at is not None],
            now=start,
            until=start + timedelta(days=days),
        ).public_bytes(Encoding.PEM)

    def newest(self) -> RevocationList:
        """Read the list; raises IdentityError where it is damaged, and OSError where it cannot be read."""
        path = self.folder / "crl.pem"
        return RevocationList.parse(path.read_bytes(), (self.folder / "ca.crt").read_bytes(), where=path)


def now() -> datetime:
    """Return the time in whole seconds, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def check_days(days: int) -> None:
    """Refuse a life that is no number of days; raises InputError."""
    if not 1 <= days <= 36500:
        raise InputError(f"days must be in 1..36500, got {days}")
