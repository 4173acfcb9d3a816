"""Runs in the journal: their states, the steps that were done for them, and the files they published."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.database import Database, Dialect
from offsite.coordinator.store.tables import LIVE, Row, artifacts, event_row, runs, steps, withdrawals
from offsite.protos.documents import plain
from offsite.protos.errors import ConflictError, NotFoundError
from offsite.protos.events import End, Event, Selected, SiteOut, Waiting
from offsite.protos.ranges import COUNT

OUT = "out:"  # the step of a site that takes part no longer is named so


class Runs(Database):
    """The tables of runs, steps and artifacts."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(dialect)
        for row in self._all(sa.select(runs.c.id, runs.c.spec).where(runs.c.rounds.is_(None))):  # of an older version
            with self._write() as connection:
                connection.execute(sa.update(runs).where(runs.c.id == row.id).values(**_title(row.spec)))

    def add_run(self, run: str, *, token: str, owner: str, spec: bytes, granted: dict[str, Any] | None = None) -> Row:
        """Insert a run and what was granted, or return the one of the same token; raises ConflictError.

        That is where its spec differs, and where the version that it is to go on from was taken back meanwhile.
        """
        with self._write() as connection:
            added = connection.execute(
                self._insert(runs)
                .values(id=run, token=token, owner=owner, spec=spec, **_title(spec))
                .values(state="queued", submitted_at=time.time())
                .on_conflict_do_nothing()
            )
            if added.rowcount and granted is not None:
                connection.execute(self._insert(steps).values(run=run, name="granted", value=granted))
                _judge_start(connection, granted.get("continues"))
            row = connection.execute(sa.select(runs).where(runs.c.token == token)).one()
        if row.spec != spec:
            raise ConflictError(f"the token was used before, for run {row.id} with another spec; use a new token")
        return row

    def run(self, run: str) -> Row:
        """Return one run; raises NotFoundError."""
        rows = self._all(sa.select(runs).where(runs.c.id == run))
        if not rows:
            raise no_run(run)
        return rows[0]

    def is_live(self, run: str) -> bool:
        """Tell whether a run is not over."""
        return bool(self._all(sa.select(runs.c.id).where(runs.c.id == run, runs.c.state.in_(LIVE))))

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
        """Return the newest runs (of one owner), or those submitted before a run, newest first, without documents."""
        brief = (column for column in runs.c if column.name not in ("spec", "report"))
        query = sa.select(*brief).order_by(runs.c.submitted_at.desc(), runs.c.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(runs.c.owner == owner)
        if before:
            last = self.run(before)
            query = query.where(sa.tuple_(runs.c.submitted_at, runs.c.id) < (last.submitted_at, last.id))
        return self._all(query)

    def rounds_done(self, ids: Iterable[str]) -> dict[str, int]:
        """Return how many rounds each run has finished; a run that has no emulator yet is not in it."""
        named = sa.and_(steps.c.name >= "version:", steps.c.name < "version;")  # as the index is sorted
        versions = steps.c.run.in_(list(ids)), named
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

    def end_run(self, run: str, end: End, *, report: str = "", published: Mapping[str, Stored] | None = None) -> None:
        """End a run once, with its report and its published files by name; a second end changes nothing."""
        with self._write() as connection:
            ended = connection.execute(
                sa.update(runs)
                .where(runs.c.id == run, runs.c.state.in_(LIVE))
                .values(state=end.kind, error=end.error, note="", report=report, finished_at=time.time())
            )
            if not ended.rowcount:
                return
            self._publish(connection, run, published or {})
            connection.execute(event_row(run, end))

    def wait_run(self, run: str, note: str, event: Waiting) -> None:
        """Let a queued run wait for its sites, told once, or change what a waiting one waits for."""
        with self._write() as connection:
            now = {"state": "waiting", "note": note, "waiting_at": time.time()}
            began = connection.execute(sa.update(runs).where(runs.c.id == run, runs.c.state == "queued").values(**now))
            if began.rowcount:
                connection.execute(event_row(run, event))
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
            value = self._insert(steps).values(run=run, name="sites", value={"names": names})
            if connection.execute(value.on_conflict_do_nothing()).rowcount:
                connection.execute(event_row(run, Selected(sites=tuple(names))))
            return True

    # steps

    def add_step(self, run: str, name: str, value: dict[str, Any], *news: Event) -> dict[str, Any]:
        """Record what a step gave, with the events that tell it, and return the record: the first stands."""
        with self._write() as connection:
            query = self._insert(steps).values(run=run, name=name, value=value).on_conflict_do_nothing()
            if connection.execute(query).rowcount:
                for event in news:
                    connection.execute(event_row(run, event))
            stood: dict[str, Any] = connection.execute(
                sa.select(steps.c.value).where(steps.c.run == run, steps.c.name == name)
            ).scalar_one()
            return stood

    def add_step_beside(
        self, run: str, name: str, value: dict[str, Any], judge: Callable[[Mapping[str, dict[str, Any]]], None]
    ) -> None:
        """Record what a step gave unless `judge` raises, which is given {run: what it gave} of all others that did it.

        Nobody records the step for another run meanwhile. A record that is there already stands.
        """
        with self._write() as connection:
            connection.execute(self._insert(steps).values(run=run, name=name, value=value).on_conflict_do_nothing())
            others = sa.select(steps).where(steps.c.name == name, steps.c.run != run)
            judge({row.run: row.value for row in connection.execute(others)})

    def steps(self, run: str) -> dict[str, dict[str, Any]]:
        """Return {name: what it gave} of all steps a run has done."""
        return {row.name: row.value for row in self._all(sa.select(steps).where(steps.c.run == run))}

    # sites that take part no longer

    def put_out(self, run: str, event: SiteOut) -> None:
        """Record that a site takes part in a run no longer, and by whom; the first word stands."""
        with self._write() as connection:
            value = {"by": event.by, "reason": event.reason}
            query = self._insert(steps).values(run=run, name=f"{OUT}{event.site}", value=value)
            if connection.execute(query.on_conflict_do_nothing()).rowcount:
                connection.execute(event_row(run, event))

    def outs(self, run: str) -> dict[str, str]:
        """Return by site, of those that take part in a run no longer, who had it so and why."""
        named = steps.c.run == run, steps.c.name >= OUT, steps.c.name < "out;"  # as the index is sorted
        rows = self._all(sa.select(steps.c.name, steps.c.value).where(*named))
        return {row.name.removeprefix(OUT): f"{row.value['by']}: {row.value['reason']}" for row in rows}

    # artifacts

    def artifacts(self, run: str) -> list[Row]:
        """Return the published files of a run by name."""
        return self._all(sa.select(artifacts).where(artifacts.c.run == run).order_by(artifacts.c.name))

    def publish(self, run: str, files: Mapping[str, Stored], step: str, value: dict[str, Any], news: Event) -> None:
        """Publish files of a run that is over, with the step that does it and the event that tells it; done once."""
        with self._write() as connection:
            done = self._insert(steps).values(run=run, name=step, value=value).on_conflict_do_nothing()
            if connection.execute(done).rowcount:
                self._publish(connection, run, files)
                connection.execute(event_row(run, news))

    def _publish(self, connection: sa.Connection, run: str, files: Mapping[str, Stored]) -> None:
        for name, file in files.items():
            row = self._insert(artifacts).values(run=run, name=name, digest=file.digest, size=file.size)
            connection.execute(row.on_conflict_do_nothing())

    def forget_artifacts(self, run: str) -> None:
        """Publish the files of a run no longer."""
        with self._write() as connection:
            connection.execute(sa.delete(artifacts).where(artifacts.c.run == run))

    def publications(self, digest: str) -> list[Row]:
        """Return (name, owner) of each published file with a digest: as what, and by whose run."""
        query = sa.select(artifacts.c.name, runs.c.owner).join(runs, runs.c.id == artifacts.c.run)
        return self._all(query.where(artifacts.c.digest == digest))


def _judge_start(connection: sa.Connection, start: Mapping[str, Any] | None) -> None:
    """Raise ConflictError if the version that a run is to go on from was taken back."""
    if not start:
        return
    run, round = start["run"], start["round"]
    gone = connection.execute(
        sa.select(withdrawals).where(withdrawals.c.run == run, withdrawals.c.round == round)
    ).first()
    if gone:
        raise ConflictError(
            f"start: {run}:{round} was just taken back by {gone.by} ({plain(gone.reason)}); name another"
        )


def _title(spec: bytes) -> dict[str, Any]:
    """Read what columns hold of a spec; one that another version wrote, or the disk garbled, must not end the list."""
    try:
        document = json.loads(spec)
        rounds, priority = (int(document.get(name, default)) for name, default in (("rounds", 1), ("priority", 0)))
        counts = {"rounds": min(max(rounds, 0), COUNT), "priority": min(max(priority, 0), COUNT)}
        return {"name": str(document.get("name", "")), **counts}
    except (ValueError, TypeError, AttributeError, OverflowError):
        return {"name": "", "rounds": 1, "priority": 0}


def no_run(run: str) -> NotFoundError:
    """Say that there is no such run."""
    return NotFoundError(f"there is no run {run!r}; `offsite run ls` shows them")
