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

from offsite.coordinator.store.tables import (
    artifacts,
    damaged,
    event_row,
    events,
    in_words,
    open_database,
    runs,
    sites,
    steps,
    tasks,
)
from offsite.protos.errors import ConflictError, NotFoundError

Row = sa.Row[Any]


class Key(NamedTuple):
    """Names one attempt of one site at one round of one run."""

    run: str
    round: int
    site: str
    attempt: int


LIVE = ("queued", "waiting", "running")  # queued: for a place; waiting: for sites
OPEN = ("offered", "taken", "downloading", "loading", "training", "uploading")  # of a task not over, in their order


class Journal:
    """Typed access to the tables; every method is one transaction and may be repeated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = open_database(path)

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with in_words(self._path), self._engine.begin() as connection:
            yield connection

    def _all(self, query: sa.Select[Any]) -> list[Row]:
        with in_words(self._path), self._engine.connect() as connection:
            return list(connection.execute(query))

    def check(self) -> None:
        """Read the whole database; raises MismatchError when it is damaged."""
        with in_words(self._path), self._engine.connect() as connection:
            if (said := str(connection.execute(sa.text("PRAGMA quick_check(1)")).scalar_one())) != "ok":
                raise damaged(self._path, said)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    # runs

    def add_run(self, run: str, *, token: str, owner: str, spec: bytes, granted: dict[str, Any] | None = None) -> Row:
        """Insert a run and what was granted, or return the one of the same token; raises ConflictError.

        That is where its spec differs.
        """
        with self._write() as connection:
            added = connection.execute(
                insert(runs)
                .values(id=run, token=token, owner=owner, spec=spec, state="queued", submitted_at=time.time())
                .on_conflict_do_nothing()
            )
            if added.rowcount and granted is not None:
                connection.execute(insert(steps).values(run=run, name="granted", value=granted))
            row = connection.execute(sa.select(runs).where(runs.c.token == token)).one()
        if row.spec != spec:
            raise ConflictError(f"the token was used before, for run {row.id} with another spec; use a new token")
        return row

    def run(self, run: str) -> Row:
        """Return one run; raises NotFoundError."""
        found = self._all(sa.select(runs).where(runs.c.id == run))
        if not found:
            raise no_run(run)
        return found[0]

    def submitted(self, token: str) -> bool:
        """Tell whether a token was used."""
        return bool(self._all(sa.select(runs.c.id).where(runs.c.token == token)))

    def live_of(self, owner: str) -> int:
        """Count the runs of one person that are not over."""
        return len(self._all(sa.select(runs.c.id).where(runs.c.owner == owner, runs.c.state.in_(LIVE))))

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

    def live(self) -> list[Row]:
        """Return (id, state, note, waiting_at) of the runs that are not over, oldest first."""
        query = sa.select(runs.c.id, runs.c.state, runs.c.note, runs.c.waiting_at).where(runs.c.state.in_(LIVE))
        return self._all(query.order_by(runs.c.submitted_at))

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
                .values(state=state, error=error, note="", finished_at=time.time())
            )
            if ended.rowcount:
                told: dict[str, Any] = {"error": error} if error else {}
                connection.execute(event_row(run, state, **told))

    def wait_run(self, run: str, note: str, **data: Any) -> None:
        """Let a queued run wait for its sites, told once, or change what a waiting one waits for."""
        with self._write() as connection:
            now = {"state": "waiting", "note": note, "waiting_at": time.time()}
            began = connection.execute(sa.update(runs).where(runs.c.id == run, runs.c.state == "queued").values(**now))
            if began.rowcount:
                connection.execute(event_row(run, "waiting", **data))
            else:
                waits = (runs.c.id == run, runs.c.state == "waiting")
                connection.execute(sa.update(runs).where(*waits).values(note=note))

    def begin_run(self, run: str, names: list[str]) -> bool:
        """Give a live run its sites, the first ones stand, and let it run; False if it is over."""
        with self._write() as connection:
            values = {"state": "running", "note": "", "waiting_at": 0.0}
            query = sa.update(runs).where(runs.c.id == run, runs.c.state.in_(LIVE))
            if not connection.execute(query.values(**values)).rowcount:
                return False
            value = insert(steps).values(run=run, name="sites", value={"names": names})
            if connection.execute(value.on_conflict_do_nothing()).rowcount:
                connection.execute(event_row(run, "selected", sites=names))
            return True

    # steps

    def add_step(self, run: str, name: str, value: dict[str, Any], *told: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        """Record what a step gave, with events (kind, data) that tell it, and return the record: the first stands."""
        with self._write() as connection:
            query = insert(steps).values(run=run, name=name, value=value).on_conflict_do_nothing()
            if connection.execute(query).rowcount:
                for kind, data in told:
                    connection.execute(event_row(run, kind, **data))
            stood: dict[str, Any] = connection.execute(
                sa.select(steps.c.value).where(steps.c.run == run, steps.c.name == name)
            ).scalar_one()
            return stood

    def steps(self, run: str) -> dict[str, dict[str, Any]]:
        """Return {name: what it gave} of all steps a run has done."""
        return {row.name: row.value for row in self._all(sa.select(steps).where(steps.c.run == run))}

    def steps_of_all(self, name: str) -> dict[str, dict[str, Any]]:
        """Return {run: what it gave} of all runs that have done a step."""
        return {row.run: row.value for row in self._all(sa.select(steps).where(steps.c.name == name))}

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

    def lose_update(self, key: Key, message: str) -> None:
        """Take back that an update was accepted: its file is lost."""
        with self._write() as connection:
            query = sa.update(tasks).where(*_is(key), tasks.c.state == "uploaded")
            if connection.execute(query.values(state="failed", update="", message=message)).rowcount:
                told = {"state": "failed", "message": message}
                connection.execute(event_row(key.run, "site", round=key.round + 1, site=key.site, **told))

    # events, sites, artifacts

    def add_event(self, run: str, kind: str, *, round: int = 0, site: str = "", **data: Any) -> None:
        """Tell watchers something."""
        with self._write() as connection:
            connection.execute(event_row(run, kind, round=round, site=site, **data))

    def events(self, run: str, *, after: int = 0, kind: str = "") -> list[Row]:
        """Return the events of a run after a sequence number, of one kind if it is named."""
        query = sa.select(events).where(events.c.run == run, events.c.seq > after).order_by(events.c.seq)
        return self._all(query.where(events.c.kind == kind) if kind else query)

    def begun_at(self, run: str, round: int, site: str) -> float | None:
        """Return when a site was first heard in a round (0 is the first): when it took its task. None before that."""
        told = events.c.run == run, events.c.kind == "site", events.c.round == round + 1, events.c.site == site
        begun: float | None = self._all(sa.select(sa.func.min(events.c.at)).where(*told))[0][0]
        return begun

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

    def forget_artifacts(self, run: str) -> None:
        """Publish the files of a run no longer."""
        with self._write() as connection:
            connection.execute(sa.delete(artifacts).where(artifacts.c.run == run))

    def thin(self, run: str, *, most: int, dry_run: bool = False) -> int:
        """Remove a run's oldest events of training steps, so that at most so many events are left; return how many."""
        mine = events.c.run == run
        with self._write() as connection:
            surplus = connection.execute(sa.select(sa.func.count()).where(mine)).scalar_one() - most
            if surplus <= 0:
                return 0
            steps_only = mine, events.c.kind == "site", events.c.data["state"].as_string() == "training"
            oldest = sa.select(events.c.seq).where(*steps_only).order_by(events.c.seq).limit(surplus)
            chosen = list(connection.execute(oldest).scalars())
            if chosen and not dry_run:
                bounds = events.c.seq.between(chosen[0], chosen[-1])
                connection.execute(sa.delete(events).where(*steps_only, bounds))
            return len(chosen)

    def publications(self, digest: str) -> list[Row]:
        """Return (name, owner) of each published file with a digest: as what, and by whose run."""
        query = sa.select(artifacts.c.name, runs.c.owner).join(runs, runs.c.id == artifacts.c.run)
        return self._all(query.where(artifacts.c.digest == digest))


def no_run(run: str) -> NotFoundError:
    """Say that there is no such run."""
    return NotFoundError(f"there is no run {run!r}; `offsite run list` shows them")


def _is(key: Key) -> list[sa.ColumnElement[bool]]:
    return [tasks.c[name] == value for name, value in key._asdict().items()]
