"""The journal's tables, and how a database is opened: made, brought up to date, and its errors put into words."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from offsite.protos.documents import plain
from offsite.protos.errors import MismatchError, OffsiteError, ResourceError

metadata = sa.MetaData()
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("token", sa.String, unique=True),
    sa.Column("owner", sa.String),
    sa.Column("spec", sa.LargeBinary),
    sa.Column("state", sa.String, index=True),
    sa.Column("error", sa.String, default=""),
    sa.Column("note", sa.String, server_default=""),  # what a live run waits for
    sa.Column("waiting_at", sa.Float, server_default="0"),  # since when it has waited for its sites; 0: it does not
    sa.Column("report", sa.String, default=""),
    sa.Column("submitted_at", sa.Float),
    sa.Column("finished_at", sa.Float, default=0.0),
)
tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("site", sa.String, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("state", sa.String),
    sa.Column("spec", sa.LargeBinary),
    sa.Column("signature", sa.LargeBinary),
    sa.Column("moved_at", sa.Float),  # when it last got further
    sa.Column("step", sa.Integer, default=0),
    sa.Column("steps", sa.Integer, default=0),
    sa.Column("loss", sa.Float, default=0.0),
    sa.Column("message", sa.String, default=""),
    sa.Column("bytes_down", sa.Integer, default=0),
    sa.Column("bytes_up", sa.Integer, default=0),
    sa.Column("update", sa.String, default=""),
    sa.Column("metrics", sa.String, default=""),
)
steps = sa.Table(  # work that was done and what it gave, so that it is never done again
    "steps",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.JSON),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run", sa.String, index=True),
    sa.Column("at", sa.Float),
    sa.Column("kind", sa.String),
    sa.Column("round", sa.Integer, default=0),
    sa.Column("site", sa.String, default=""),
    sa.Column("data", sa.JSON),
)
sites = sa.Table(
    "sites",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("seen_at", sa.Float),
    sa.Column("examples", sa.Integer, default=0),
    sa.Column("version", sa.String, default=""),
    sa.Column("policy", sa.String, default=""),
)
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("digest", sa.String),
    sa.Column("size", sa.Integer),
)


def event_row(run: str, kind: str, *, round: int = 0, site: str = "", **data: Any) -> sa.Insert:
    """Insert an event, now."""
    values = {"run": run, "at": time.time(), "kind": kind, "round": round, "site": site, "data": data}
    return sa.insert(events).values(**values)


class Unwritable(ResourceError):
    """The journal cannot be read or written now: nothing is wrong with the runs, which go on once it can."""


def open_database(path: Path) -> sa.Engine:
    """Open a journal, made if missing; columns that an older one lacks are added. Raises OffsiteError."""
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    sa.event.listen(engine, "connect", _prepare)
    with in_words(path):
        metadata.create_all(engine)
        with engine.begin() as connection:
            for table in metadata.sorted_tables:
                there = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
                for column in table.columns:
                    if column.name not in there:
                        made = sa.schema.CreateColumn(column).compile(dialect=engine.dialect)
                        connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {made}"))
    return engine


@contextmanager
def in_words(path: Path) -> Iterator[None]:
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
        return damaged(path, str(error))
    for start, what in HINDERED.items():
        if name.startswith(start):
            return Unwritable(f"{path}: {what}")
    return None


def damaged(path: Path, what: str) -> MismatchError:
    """Return the sentence about a journal that is not one, or not whole."""
    return MismatchError(
        f"{path}: the journal is damaged ({plain(what, most=100)}); put a backup in its place, "
        f"or move it away with its -wal and -shm to begin anew without the runs that it knew"
    )


def _prepare(connection: Any, _: Any) -> None:
    """WAL lets readers go on while one writes; FULL makes a commit durable before it returns."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
