"""How the journal's database is opened, read and written; what differs by database is its dialect's."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from offsite.coordinator.store import Unusable
from offsite.coordinator.store.tables import Row, metadata
from offsite.protos.errors import OffsiteError


class Unwritable(Unusable):
    """The journal cannot be read or written now."""


class Watch(Protocol):
    """Tells whether a database has changed since the last look, whichever process wrote; a look waits for nobody."""

    def changed(self) -> bool:
        """Tell whether anything was committed since the last look, or may have been."""

    def close(self) -> None:
        """Look no more."""


class Hold(Protocol):
    """What one process at a time has of a journal, until it lets go of it or ends, however it ends."""

    def take(self) -> bool:
        """Take it unless another process has it, and tell whether it is this one's; raises Unwritable when unsure."""

    def close(self) -> None:
        """Let go of it; it may be taken again."""


class Dialect(Protocol):
    """What differs between the databases that a journal can be in; a file each."""

    def engine(self) -> sa.Engine:
        """Return what connects to the database; raises OffsiteError or what `words` knows."""

    def insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """Return an insert into a table, which can be told what to do where the row is there."""

    def begin(self, connection: sa.Connection) -> None:
        """Have a write transaction wait for the one before it: numbers of events are in the order of commits."""

    def freeze(self, connection: sa.Connection) -> None:
        """Have all that is read on a fresh connection be of one moment; nobody waits for it meanwhile."""

    def renumber(self, connection: sa.Connection) -> None:
        """Number new events after those that are there, whoever numbered these."""

    def check(self, connection: sa.Connection) -> None:
        """Read all of the database where it is a file of ours; raises MismatchError when it is damaged."""

    def words(self, error: object) -> OffsiteError | None:
        """Turn what the database says into a sentence that names it and what to do; None where it is our fault."""

    def watch(self) -> Watch:
        """Return what tells whether the database has changed."""

    def hold(self) -> Hold:
        """Return what one process at a time can take."""


class Database:
    """One database; what is written in one transaction is there whole or not at all."""

    def __init__(self, dialect: Dialect) -> None:
        """Open a journal, made if missing; columns and indices that an older one lacks are added."""
        self._dialect = dialect
        self._insert = dialect.insert
        self._on_write: Callable[[], object] | None = None
        self.timed: Callable[[float], object] = lambda seconds: None  # is told how long each write took
        with self._in_words():
            self._engine = dialect.engine()
        try:
            with self._transaction() as connection:
                _complete(connection)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with self._in_words(), self._engine.begin() as connection:
            self._dialect.begin(connection)
            yield connection

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        start = time.perf_counter()
        with self._transaction() as connection:
            yield connection
        self.timed(time.perf_counter() - start)
        if self._on_write is not None:
            self._on_write()

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._in_words(), self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")  # one statement needs no transaction

    @contextmanager
    def _frozen(self) -> Iterator[sa.Connection]:
        with self._in_words(), self._engine.connect() as connection:
            self._dialect.freeze(connection)
            yield connection

    def _all(self, query: sa.Select[Any]) -> list[Row]:
        with self._read() as connection:
            return list(connection.execute(query))

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Turn what the database says into a sentence."""
        try:
            yield
        except Exception as error:
            known = self._dialect.words(getattr(error, "orig", error))
            if known is None:
                raise
            raise known from None

    def check(self) -> None:
        """Read the whole database where it is a file of ours; raises MismatchError when it is damaged."""
        with self._read() as connection:
            self._dialect.check(connection)

    def watch(self, on_write: Callable[[], object] | None = None) -> Watch:
        """Return what tells whether the database has changed; what is written through this object calls `on_write`.

        It is called in the thread that wrote, once what it wrote can be read.
        """
        self._on_write = on_write
        with self._in_words():
            return self._dialect.watch()

    def hold(self) -> Hold:
        """Return what one process at a time can take; it is not taken yet."""
        return self._dialect.hold()

    def close(self) -> None:
        """Let go of the database; what another thread is at is done first."""
        sa.event.listen(self._engine, "checkin", lambda _, record: record.invalidate())
        self._engine.dispose()


def _complete(connection: sa.Connection) -> None:
    """Add the tables, columns and indices that are missing."""
    metadata.create_all(connection)
    inspector = sa.inspect(connection)
    columns = {(table, one["name"]) for (_, table), all_ in inspector.get_multi_columns().items() for one in all_}
    indices = {one["name"] for all_ in inspector.get_multi_indexes().values() for one in all_}
    for table in metadata.sorted_tables:
        for column in table.columns:
            if (table.name, column.name) not in columns:
                definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
                connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))
        for index in table.indexes:
            if index.name not in indices:
                index.create(connection)
