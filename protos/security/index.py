"""What the authority remembers: the certificates and the tokens that it has made."""

from datetime import UTC, datetime

from offsite.protos.documents import document
from offsite.protos.ranges import Positive
from offsite.protos.security.certificates import Role


@document
class Entry:
    """One certificate the authority has issued."""

    serial: str  # hexadecimal
    role: Role
    name: str
    expires: datetime
    issued_at: datetime | None = None  # None: by an earlier version
    asked_by: str = ""  # the serial of the token or the certificate that it was asked for with; empty: the owner did
    key: str = ""  # fingerprint of the key that was certified, where it was asked for
    revoked_at: datetime | None = None
    contested_at: datetime | None = None  # when it was last to be renewed for another key than it has been renewed for

    @property
    def status(self) -> str:
        """`valid`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "valid" if self.expires > datetime.now(UTC) else "expired"


@document
class Invitation:
    """One token the authority has made: who may join by it, once and until it expires."""

    serial: str  # hexadecimal; of the certificate in the token
    role: Role
    name: str
    expires: datetime
    days: Positive  # for which the certificate holds that it is used for
    used_at: datetime | None = None
    revoked_at: datetime | None = None
    contested_at: datetime | None = None  # when it was last to be used for another key than it has been used for

    @property
    def status(self) -> str:
        """`open`, `used`, `expired` or `revoked`."""
        if self.used_at is not None:
            return "used"
        if self.revoked_at is not None:
            return "revoked"
        return "open" if self.expires > datetime.now(UTC) else "expired"


@document
class Index:
    """All certificates and tokens that the authority has made, oldest first."""

    certificates: tuple[Entry, ...] = ()
    tokens: tuple[Invitation, ...] = ()

    @property
    def all(self) -> tuple[Entry | Invitation, ...]:
        """All certificates, then all tokens."""
        return (*self.certificates, *self.tokens)


class Ledger:
    """The same to be looked up and added to: neither takes longer the more there are."""

    def __init__(self, index: Index) -> None:
        self._rows: dict[str, Entry | Invitation] = {}  # by serial number
        self._names: dict[str, list[str]] = {}  # serial numbers by name, without its case
        self._answers: dict[str, str] = {}  # serial numbers by that of who asked
        self.put(*index.all)

    def put(self, *rows: Entry | Invitation) -> None:
        """Have these take the place of those with the same serial numbers; new ones come last."""
        for row in rows:
            if row.serial not in self._rows:
                self._names.setdefault(row.name.casefold(), []).append(row.serial)
            self._rows[row.serial] = row
            if isinstance(row, Entry) and row.asked_by:
                self._answers.setdefault(row.asked_by, row.serial)

    def index(self) -> Index:
        """Return all of it."""
        rows = self._rows.values()
        return Index(
            certificates=tuple(row for row in rows if isinstance(row, Entry)),
            tokens=tuple(row for row in rows if isinstance(row, Invitation)),
        )

    def asker(self, serial: str) -> Entry | Invitation | None:
        """Return the certificate or the token of a serial number."""
        return self._rows.get(serial)

    def answer(self, serial: str) -> Entry | None:
        """Return the certificate that was given to whoever asked with this serial number's."""
        row = self._rows.get(self._answers.get(serial, ""))
        return row if isinstance(row, Entry) else None

    def alike(self, name: str) -> list[Entry | Invitation]:
        """Return all certificates and tokens of a name, and of those that differ from it only in case."""
        return [self._rows[serial] for serial in self._names.get(name.casefold(), ())]

    def of(self, name: str) -> list[Entry | Invitation]:
        """Return what holds of a name: certificates that are valid, and tokens that are open."""
        return [row for row in self.alike(name) if row.name == name and row.status in ("valid", "open")]
