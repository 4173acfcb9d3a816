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

    def asker(self, serial: str) -> Entry | Invitation | None:
        """Return the certificate or the token of a serial number."""
        return next((one for one in self.all if one.serial == serial), None)

    def answer(self, serial: str) -> Entry | None:
        """Return the certificate that was given to whoever asked with this serial number's."""
        return next((entry for entry in self.certificates if entry.asked_by == serial), None)

    def of(self, name: str) -> list[Entry | Invitation]:
        """Return what holds of a name: certificates that are valid, and tokens that are open."""
        return [one for one in self.all if one.name == name and one.status in ("valid", "open")]

    def having(self, *others: Entry | Invitation) -> "Index":
        """Return an index in which these take the place of those with the same serial numbers; new ones come last."""
        new = {one.serial: one for one in others}
        certificates = [new.pop(one.serial, one) for one in self.certificates]
        tokens = [new.pop(one.serial, one) for one in self.tokens]
        certificates += [one for one in new.values() if isinstance(one, Entry)]
        tokens += [one for one in new.values() if isinstance(one, Invitation)]
        return Index(certificates=tuple(certificates), tokens=tuple(tokens))  # type: ignore[arg-type]
