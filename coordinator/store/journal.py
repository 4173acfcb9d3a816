"""The journal: what happened, durable before it is acknowledged. SQLite in WAL mode.

Nothing else holds state: a supervisor or a server that is killed reads the journal and goes on.
Times are seconds since the epoch. Documents are kept as the bytes that were hashed or signed.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from offsite.protos.errors import ConflictError, NotFoundError

Row = sa.Row[Any]


class Key(NamedTuple):
    """Names one attempt of one site at one round of one run."""

    run: str
    round: int
    site: str
    attempt: int


LIVE = ("queued", "running")
OPEN = ("offered", "downloading", "loading", "training", "uploading")  # states of a task that is not over

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


class Journal:
    """Typed access to the tables; every method is one transaction and may be repeated."""

    def __init__(self, path: Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        sa.event.listen(self._engine, "connect", _prepare)
        metadata.create_all(self._engine)

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._engine.begin() as connection:
            yield connection

    def _all(self, query: sa.Select[Any]) -> list[Row]:
        with self._engine.connect() as connection:
            return list(connection.execute(query))

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    # runs

    def add_run(self, run: str, *, token: str, owner: str, spec: bytes) -> Row:
        """Insert a run, or return the one of the same token; raises ConflictError if that one's spec differs."""
        with self._write() as connection:
            connection.execute(
                insert(runs)
                .values(id=run, token=token, owner=owner, spec=spec, state="queued", submitted_at=time.time())
                .on_conflict_do_nothing()
            )
            row = connection.execute(sa.select(runs).where(runs.c.token == token)).one()
        if row.spec != spec:
            raise ConflictError(f"the token was used before, for run {row.id} with another spec; use a new token")
        return row

    def run(self, run: str) -> Row:
        """Return one run; raises NotFoundError."""
        found = self._all(sa.select(runs).where(runs.c.id == run))
        if not found:
            raise NotFoundError(f"there is no run {run!r}; `offsite run list` shows them")
        return found[0]

    def runs(self, states: tuple[str, ...] = ()) -> list[Row]:
        """Return all runs, or those in the given states, oldest first."""
        query = sa.select(runs).order_by(runs.c.submitted_at)
        return self._all(query.where(runs.c.state.in_(states)) if states else query)

    def page(self, *, limit: int, before: str = "", owner: str | None = None) -> list[Row]:
        """Return the newest runs (of one owner), or those submitted before a run, newest first."""
        query = sa.select(runs).order_by(runs.c.submitted_at.desc(), runs.c.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(runs.c.owner == owner)
        if before:
            last = self.run(before)
            query = query.where(sa.tuple_(runs.c.submitted_at, runs.c.id) < (last.submitted_at, last.id))
        return self._all(query)

    def rounds_done(self, ids: Iterable[str]) -> dict[str, int]:
        """Return how many rounds each run has finished; a run that has no emulator yet is not in it."""
        versions = steps.c.run.in_(list(ids)), steps.c.name.startswith("version:")
        query = sa.select(steps.c.run, sa.func.count().label("versions")).where(*versions).group_by(steps.c.run)
        return {row.run: row.versions - 1 for row in self._all(query)}

    def set_run(self, run: str, **values: Any) -> None:
        """Change fields of a run that is not over; an ended run stays as it ended."""
        with self._write() as connection:
            connection.execute(sa.update(runs).where(runs.c.id == run, runs.c.state.in_(LIVE)).values(**values))

    def end_run(self, run: str, state: str, *, error: str = "") -> None:
        """End a run once; a second end changes nothing."""
        with self._write() as connection:
            ended = connection.execute(
                sa.update(runs)
                .where(runs.c.id == run, runs.c.state.in_(LIVE))
                .values(state=state, error=error, finished_at=time.time())
            )
            if ended.rowcount:
                event = {"run": run, "at": time.time(), "kind": state, "data": {"error": error} if error else {}}
                connection.execute(sa.insert(events).values(**event))

    # steps

    def add_step(self, run: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Record what a step gave and return the record: the first one stands."""
        with self._write() as connection:
            connection.execute(insert(steps).values(run=run, name=name, value=value).on_conflict_do_nothing())
            stood: dict[str, Any] = connection.execute(
                sa.select(steps.c.value).where(steps.c.run == run, steps.c.name == name)
            ).scalar_one()
            return stood

    def steps(self, run: str) -> dict[str, dict[str, Any]]:
        """Return {name: what it gave} of all steps a run has done."""
        return {row.name: row.value for row in self._all(sa.select(steps).where(steps.c.run == run))}

    # tasks

    def add_task(self, key: Key, *, spec: bytes, signature: bytes) -> None:
        """Offer a task; the same key again changes nothing."""
        with self._write() as connection:
            values = {
                **key._asdict(),
                "spec": spec,
                "signature": signature,
                "state": "offered",
                "moved_at": time.time(),
            }
            connection.execute(insert(tasks).values(**values).on_conflict_do_nothing())

    def tasks(self, run: str, round: int | None = None) -> list[Row]:
        """Return the tasks of a run or of one of its rounds, by round, site and attempt."""
        query = sa.select(tasks).where(tasks.c.run == run)
        query = query if round is None else query.where(tasks.c.round == round)
        return self._all(query.order_by(tasks.c.round, tasks.c.site, tasks.c.attempt))

    def task(self, key: Key) -> Row:
        """Return one task; raises NotFoundError."""
        found = self._all(sa.select(tasks).where(*_is(key)))
        if not found:
            raise NotFoundError(
                f"site {key.site} has no task of run {key.run}, round {key.round}, attempt {key.attempt}"
            )
        return found[0]

    def open_tasks(self, site: str) -> list[Row]:
        """Return the open tasks of a site in live runs, those of the oldest run first."""
        query = (
            sa.select(tasks)
            .join(runs, runs.c.id == tasks.c.run)
            .where(tasks.c.site == site, tasks.c.state.in_(OPEN), runs.c.state.in_(LIVE))
            .order_by(runs.c.submitted_at, tasks.c.round, tasks.c.attempt.desc())
        )
        return self._all(query)

    def set_task(self, key: Key, **values: Any) -> bool:
        """Change an open task and say whether it was open; a closed one stays as it is."""
        with self._write() as connection:
            query = sa.update(tasks).where(*_is(key), tasks.c.state.in_(OPEN))
            return bool(connection.execute(query.values(**values)).rowcount)

    # events, sites, artifacts

    def add_event(self, run: str, kind: str, *, round: int = 0, site: str = "", **data: Any) -> None:
        """Tell watchers something."""
        with self._write() as connection:
            values = {"run": run, "at": time.time(), "kind": kind, "round": round, "site": site, "data": data}
            connection.execute(sa.insert(events).values(**values))

    def events(self, run: str, *, after: int = 0) -> list[Row]:
        """Return the events of a run after a sequence number."""
        return self._all(sa.select(events).where(events.c.run == run, events.c.seq > after).order_by(events.c.seq))

    def enrol(self, site: str, **values: Any) -> None:
        """Record a site and what it said of itself."""
        values["seen_at"] = time.time()
        with self._write() as connection:
            query = insert(sites).values(name=site, **values)
            connection.execute(query.on_conflict_do_update(index_elements=["name"], set_=values))

    def see(self, site: str) -> None:
        """Record that a site called just now."""
        with self._write() as connection:
            connection.execute(sa.update(sites).where(sites.c.name == site).values(seen_at=time.time()))

    def sites(self) -> list[Row]:
        """Return the enrolled sites by name."""
        return self._all(sa.select(sites).order_by(sites.c.name))

    def add_artifact(self, run: str, name: str, *, digest: str, size: int) -> None:
        """Publish a file of a run."""
        with self._write() as connection:
            query = insert(artifacts).values(run=run, name=name, digest=digest, size=size)
            keys = ["run", "name"]
            connection.execute(query.on_conflict_do_update(index_elements=keys, set_={"digest": digest, "size": size}))

    def artifacts(self, run: str) -> list[Row]:
        """Return the published files of a run by name."""
        return self._all(sa.select(artifacts).where(artifacts.c.run == run).order_by(artifacts.c.name))

    def is_artifact(self, digest: str) -> bool:
        """Tell whether a file was published by any run."""
        return bool(self._all(sa.select(artifacts.c.digest).where(artifacts.c.digest == digest).limit(1)))


def _is(key: Key) -> list[sa.ColumnElement[bool]]:
    return [tasks.c[name] == value for name, value in key._asdict().items()]


def _prepare(connection: Any, _: Any) -> None:
    """WAL lets readers go on while one writes; FULL makes a commit durable before it returns."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
