"""The journal in a file of SQLite, in WAL mode."""

import fcntl
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import Insert, insert

from offsite.coordinator.store.database import Unwritable
from offsite.protos.documents import plain
from offsite.protos.errors import MismatchError, OffsiteError

DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT", "SQLITE_SCHEMA")
HINDERED = {
    "SQLITE_FULL": "the disk is full; free some space",
    "SQLITE_BUSY": "another process holds it; end that",
    "SQLITE_LOCKED": "another process holds it; end that",
    "SQLITE_READONLY": "it may only be read; make it and its folder writable",
    "SQLITE_PERM": "it may not be used; look at its rights",
    "SQLITE_CANTOPEN": "it cannot be opened; look at its folder and its rights",
    "SQLITE_IOERR": "the disk fails or is full; look at it",
}
# WAL lets readers go on while one writes; FULL makes a commit durable before it returns.
PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")


@dataclass(frozen=True)
class Sqlite:
    """A file; one process at a time writes to it, which SQLite itself sees to."""

    path: Path

    def engine(self) -> sa.Engine:
        """Return what opens the file, made if missing."""
        url = sa.URL.create("sqlite", database=str(self.path))
        engine = sa.create_engine(url, connect_args={"timeout": 30})
        sa.event.listen(engine, "connect", _prepare)
        return engine

    def insert(self, table: sa.Table) -> Insert:
        """Return an insert into a table."""
        return insert(table)

    def begin(self, connection: sa.Connection) -> None:
        """Nothing is needed: the first write of a transaction waits."""

    def freeze(self, connection: sa.Connection) -> None:
        """Begin a transaction: in WAL mode it reads what was there at its first look."""
        connection.exec_driver_sql("BEGIN")

    def renumber(self, connection: sa.Connection) -> None:
        """Nothing is needed: the next number is one more than the largest."""

    def check(self, connection: sa.Connection) -> None:
        """Read all of the file; raises MismatchError when it is damaged."""
        if (answer := str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one())) != "ok":
            raise self._damaged(answer)

    def words(self, error: object) -> OffsiteError | None:
        """Turn what SQLite says into a sentence that names the file and what to do."""
        name = error.sqlite_errorname if isinstance(error, sqlite3.Error) and hasattr(error, "sqlite_errorname") else ""
        if name.startswith(DAMAGED):
            return self._damaged(str(error))
        what = next((what for start, what in HINDERED.items() if name.startswith(start)), None)
        return Unwritable(f"{self.path}: {what}") if what else None

    def _damaged(self, what: str) -> MismatchError:
        return MismatchError(
            f"{self.path}: the journal is damaged ({plain(what, most=100)}); put a backup in its place, "
            f"or move it away with its -wal and -shm to begin anew without the runs that it knew"
        )

    def watch(self) -> "Watch":
        """Return what tells whether the file has changed."""
        return Watch(self)

    def hold(self) -> "Hold":
        """Return what locks a file beside the journal."""
        return Hold(self.path.with_name(f"{self.path.name}.lock"))


class Watch:
    """Reads one number from memory that SQLite shares between processes: it takes microseconds."""

    def __init__(self, dialect: Sqlite) -> None:
        self._dialect = dialect
        self._connection = sqlite3.connect(dialect.path, isolation_level=None, check_same_thread=False)
        _prepare(self._connection)
        self._version = self._look()

    def changed(self) -> bool:
        """Tell whether anything was committed since the last look."""
        before, self._version = self._version, self._look()
        return before != self._version

    def _look(self) -> int:
        try:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            raise self._dialect.words(error) or error from None

    def close(self) -> None:
        """Look no more."""
        self._connection.close()


class Hold:
    """A lock on a file beside the journal; it ends with its process, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: TextIO | None = None

    def take(self) -> bool:
        """Take the lock unless another process has it, and tell whether it is this one's; the system keeps it."""
        if self._handle is None:
            handle = self._path.open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                return False
            self._handle = handle
        return True

    def close(self) -> None:
        """Let go of it."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _prepare(connection: Any, _: Any = None) -> None:
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
