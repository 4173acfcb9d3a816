"""How the journal's database is opened, read and written, and what it says put into words."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from offsite.coordinator.store.tables import Row, metadata
from offsite.protos.documents import plain
from offsite.protos.errors import MismatchError, OffsiteError, ResourceError


class Unwritable(ResourceError):
    """The journal cannot be read or written now: nothing is wrong with the runs, which go on once it can."""


class Database:
    """One database file; what is written in one transaction is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = _open(path)
        self._on_write: Callable[[], object] | None = None

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with _in_words(self._path), self._engine.begin() as connection:
            yield connection
        if self._on_write is not None:
            self._on_write()

    def _all(self, query: sa.Select[Any]) -> list[Row]:
        with _in_words(self._path), self._engine.connect() as connection:
            return list(connection.execute(query))

    def check(self) -> None:
        """Read the whole database; raises MismatchError when it is damaged."""
        with _in_words(self._path), self._engine.connect() as connection:
            if (said := str(connection.execute(sa.text("PRAGMA quick_check(1)")).scalar_one())) != "ok":
                raise _damaged(self._path, said)

    def watch(self, on_write: Callable[[], object] | None = None) -> "Watch":
        """Return what tells whether the database has changed; what is written through this object calls `on_write`.

        It is called in the thread that wrote, once what it wrote can be read.
        """
        self._on_write = on_write
        return Watch(self._path, self._engine)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()


class Watch:
    """Tells whether a database has changed since the last look, whichever process wrote.

    A look reads one number from memory that SQLite shares between processes: it takes microseconds, and waits for
    nobody who reads or writes.
    """

    def __init__(self, path: Path, engine: sa.Engine) -> None:
        self._path = path
        self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._version = self._look()

    def changed(self) -> bool:
        """Tell whether anything was committed since the last look."""
        before, self._version = self._version, self._look()
        return before != self._version

    def _look(self) -> int:
        with _in_words(self._path):
            return int(self._connection.exec_driver_sql("PRAGMA data_version").scalar_one())

    def close(self) -> None:
        """Look no more."""
        self._connection.close()


def _open(path: Path) -> sa.Engine:
    """Open a journal, made if missing; columns and indices that an older one lacks are added. Raises OffsiteError."""
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": 30})
    sa.event.listen(engine, "connect", _prepare)
    with _in_words(path):
        metadata.create_all(engine)
        with engine.begin() as connection:
            for table in metadata.sorted_tables:
                there = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
                for column in table.columns:
                    if column.name not in there:
                        made = sa.schema.CreateColumn(column).compile(dialect=engine.dialect)
                        connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {made}"))
                for index in table.indexes:
                    index.create(connection, checkfirst=True)
    return engine


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turn what SQLite says into a sentence that names the file and what to do."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        known = _known(path, error.orig)
        if known is None:
            raise
        raise known from None


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


def _known(path: Path, error: object) -> OffsiteError | None:
    name = error.sqlite_errorname if isinstance(error, sqlite3.Error) and hasattr(error, "sqlite_errorname") else ""
    if name.startswith(DAMAGED):
        return _damaged(path, str(error))
    for start, what in HINDERED.items():
        if name.startswith(start):
            return Unwritable(f"{path}: {what}")
    return None


def _damaged(path: Path, what: str) -> MismatchError:
    """Return the sentence about a journal that is not one, or not whole."""
    return MismatchError(
        f"{path}: the journal is damaged ({plain(what, most=100)}); put a backup in its place, "
        f"or move it away with its -wal and -shm to begin anew without the runs that it knew"
    )


# WAL lets readers go on while one writes; FULL makes a commit durable before it returns.
PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")


def _prepare(connection: Any, _: Any) -> None:
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
