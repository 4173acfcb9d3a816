"""Tasks in the journal, and the sites that do them."""

import time
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import LIVE, OPEN, Row, event_row, runs, sites, tasks
from offsite.protos.errors import NotFoundError
from offsite.protos.events import Event, SiteState


class Key(NamedTuple):
    """Names one attempt of one site at one round of one run."""

    run: str
    round: int
    site: str
    attempt: int


class Tasks(Database):
    """The tables of tasks and sites."""

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

    def set_task(self, key: Key, event: Event | None = None, **values: Any) -> bool:
        """Change an open task, with the event that tells it, and say whether it was open; a closed one stays."""
        return self._set(key, OPEN, event, values)

    def close_task(self, key: Key, state: str, message: str) -> bool:
        """Close an open task without an update, tell why, and say whether it was open."""
        return self._set(key, OPEN, _why(key, state, message), {"state": state, "message": message})

    def lose_update(self, key: Key, message: str) -> None:
        """Take back that an update was accepted: its file is lost."""
        values = {"state": "failed", "message": message, "update": ""}
        self._set(key, ("uploaded",), _why(key, "failed", message), values)

    def _set(self, key: Key, states: tuple[str, ...], event: Event | None, values: dict[str, Any]) -> bool:
        with self._write() as connection:
            query = sa.update(tasks).where(*_is(key), tasks.c.state.in_(states))
            changed = bool(connection.execute(query.values(**values)).rowcount)
            if changed and event is not None:
                connection.execute(event_row(key.run, event))
            return changed

    # sites

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


def _is(key: Key) -> list[sa.ColumnElement[bool]]:
    return [tasks.c[name] == value for name, value in key._asdict().items()]


def _why(key: Key, state: str, message: str) -> SiteState:
    return SiteState(round=key.round + 1, site=key.site, state=state, message=message)
