"""Tasks in the journal, and the sites that do them."""

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import ENDED, LIVE, OPEN, Row, event_row, event_values, events, runs, sites, tasks
from offsite.protos.errors import NotFoundError
from offsite.protos.events import Event, SiteState


class Key(NamedTuple):
    """Names one attempt of one site at one round of one run."""

    run: str
    round: int
    site: str
    attempt: int


class Move(NamedTuple):
    """A change of an open task: the fields that change, and the event that tells of it, if one does."""

    key: Key
    values: dict[str, Any]
    event: Event | None = None


_NO_BYTES = sa.cast(sa.literal_column("''"), sa.LargeBinary)
_IS_OPEN = tasks.c.state.in_([sa.literal_column(f"'{state}'") for state in OPEN])
# One statement for all changes of open tasks, in bursts of thousands: each names the fields that it sets.
_CHANGE = sa.update(tasks).where(_IS_OPEN, *(tasks.c[name] == sa.bindparam(f"its_{name}") for name in Key._fields))


class Tasks(Database):
    """The tables of tasks and sites."""

    def add_task(self, key: Key, *, spec: bytes, signature: bytes) -> None:
        """Offer a task; the same key again changes nothing."""
        self.add_tasks([(key, spec, signature)])

    def add_tasks(self, offers: Iterable[tuple[Key, bytes, bytes]]) -> None:
        """Offer tasks (key, spec, signature), all or none; a key that is there already stays as it is."""
        now = {"state": "offered", "moved_at": time.time()}
        rows = [{**key._asdict(), "spec": spec, "signature": signature, **now} for key, spec, signature in offers]
        if rows:
            with self._write() as connection:
                connection.execute(self._insert(tasks).on_conflict_do_nothing(), rows)

    def record_tasks(self, ended: Iterable[tuple[Key, dict[str, Any]]]) -> None:
        """Write tasks that nobody was offered, as a simulation's are, as they ended; a key that is there stays."""
        now = time.time()
        rows = [{**key._asdict(), "moved_at": now, **values} for key, values in ended]
        query = self._insert(tasks).values(spec=_NO_BYTES, signature=_NO_BYTES)  # a parameter takes longer
        if rows:
            with self._write() as connection:
                connection.execute(query.on_conflict_do_nothing(), rows)

    def tasks(self, run: str, round: int | None = None) -> list[Row]:
        """Return the tasks of a run or of one of its rounds, by round, site and attempt."""
        query = sa.select(tasks).where(tasks.c.run == run)
        query = query if round is None else query.where(tasks.c.round == round)
        return self._all(query.order_by(tasks.c.round, tasks.c.site, tasks.c.attempt))

    def newest_updates(self, run: str) -> dict[str, str]:
        """Return by site the digest of its newest accepted update in a run."""
        query = sa.select(tasks.c.site, tasks.c.update).where(tasks.c.run == run, tasks.c.state == "uploaded")
        return {row.site: row.update for row in self._all(query.order_by(tasks.c.round, tasks.c.attempt))}

    def task(self, key: Key) -> Row:
        """Return one task; raises NotFoundError."""
        rows = self._all(sa.select(tasks).where(*_is(key)))
        if not rows:
            raise NotFoundError(
                f"site {key.site} has no task of run {key.run}, round {key.round}, attempt {key.attempt}"
            )
        return rows[0]

    def open_tasks(self, *names: str) -> list[Row]:
        """Return the open tasks of some sites in live runs, each with the run's owner and priority.

        A task that was begun comes first, then that of the highest priority, of one that of the oldest run.
        """
        query = (
            sa.select(tasks, runs.c.owner, runs.c.priority)
            .join(runs, runs.c.id == tasks.c.run)
            .where(tasks.c.site.in_(names), tasks.c.state.in_(OPEN), runs.c.state.in_(LIVE))
            .order_by(tasks.c.state == "offered", runs.c.priority.desc())
            .order_by(runs.c.submitted_at, tasks.c.round, tasks.c.attempt.desc())
        )
        return self._all(query)

    def _served(self, names: Collection[str]) -> dict[tuple[str, str], float]:
        """Return by (site, owner) when a site was last heard of at a task of the owner's runs."""
        taken = tasks.c.state.in_([*OPEN[1:], *ENDED]), tasks.c.site.in_(names)
        query = sa.select(tasks.c.site, runs.c.owner, sa.func.max(tasks.c.moved_at).label("at"))
        query = query.join(runs, runs.c.id == tasks.c.run).where(*taken).group_by(tasks.c.site, runs.c.owner)
        return {(row.site, row.owner): row.at for row in self._all(query)}

    def next_tasks(self, names: Sequence[str]) -> list[Row | None]:
        """Return the task that each of some sites should do next, or None.

        Of several owners whose tasks have one priority, it is that of whom the site has done nothing for the longest.
        """
        equals: dict[str, list[Row]] = {}
        for task in self.open_tasks(*names):
            best = equals.setdefault(task.site, [task])[0]
            if task is not best and task.state == best.state == "offered" and task.priority == best.priority:
                equals[task.site].append(task)
        contested = [site for site, some in equals.items() if len({task.owner for task in some}) > 1]
        served = self._served(contested) if contested else {}
        first = {
            site: min(some, key=lambda task: served.get((task.site, task.owner), 0.0)) for site, some in equals.items()
        }
        return [first.get(name) for name in names]

    def offered(self) -> set[str]:
        """Return the sites that have a task in a live run which they have not taken."""
        query = sa.select(tasks.c.site).join(runs, runs.c.id == tasks.c.run)
        return {row.site for row in self._all(query.where(tasks.c.state == "offered", runs.c.state.in_(LIVE)))}

    def set_task(self, key: Key, event: Event | None = None, **values: Any) -> bool:
        """Change an open task, with the event that tells it, and say whether it was open; a closed one stays."""
        return self.move_tasks([Move(key, values, event)])[0]

    def close_task(self, key: Key, state: str, message: str) -> bool:
        """Close an open task without an update, tell why, and say whether it was open."""
        return self.set_task(key, _why(key, state, message), state=state, message=message)

    def move_tasks(self, moves: Sequence[Move]) -> list[bool]:
        """Change open tasks and tell of it, in one transaction; say of each whether it was open: a closed one stays."""
        with self._write() as connection:
            were_open = [
                bool(connection.execute(_CHANGE, {**move.values, **_named(move.key)}).rowcount) for move in moves
            ]
            rows = [
                event_values(move.key.run, move.event)
                for move, was_open in zip(moves, were_open, strict=True)
                if was_open and move.event is not None
            ]
            if rows:
                connection.execute(sa.insert(events), rows)
        return were_open

    def end_tasks(self, run: str, site: str, message: str) -> None:
        """End the open tasks of a site that takes part in a run no longer."""
        mine = tasks.c.run == run, tasks.c.site == site, _IS_OPEN
        with self._write() as connection:
            connection.execute(sa.update(tasks).where(*mine).values(state="out", message=message))

    def end_late(self, run: str, round: int, *, entered: Collection[str], message: str) -> None:
        """End the tasks of a round but those of the sites whose update is in one: what is open, and what came since."""
        mine = tasks.c.run == run, tasks.c.round == round, tasks.c.state.in_([*OPEN, "uploaded"])
        with self._write() as connection:
            for task in connection.execute(sa.select(tasks).where(*mine).order_by("site", "attempt")).all():
                if task.site in entered:
                    continue
                key = Key(run, round, task.site, task.attempt)
                connection.execute(sa.update(tasks).where(*_is(key)).values(state="late", message=message, update=""))
                connection.execute(event_row(run, _why(key, "late", message)))

    def lose_update(self, key: Key, message: str) -> None:
        """Take back that an update was accepted: its file is lost."""
        with self._write() as connection:
            query = sa.update(tasks).where(*_is(key), tasks.c.state == "uploaded")
            if connection.execute(query.values(state="failed", message=message, update="", norm=None)).rowcount:
                connection.execute(event_row(key.run, _why(key, "failed", message)))

    # sites

    def enrol(self, site: str, **values: Any) -> None:
        """Record a site and what it said of itself."""
        values["seen_at"] = time.time()
        with self._write() as connection:
            query = self._insert(sites).values(name=site, **values)
            connection.execute(query.on_conflict_do_update(index_elements=["name"], set_=values))

    def see(self, *names: str) -> None:
        """Record that sites were heard just now."""
        with self._write() as connection:
            connection.execute(sa.update(sites).where(sites.c.name.in_(names)).values(seen_at=time.time()))

    def see_no_longer(self, site: str) -> None:
        """Record that a site has left: it is not here until it is heard again."""
        with self._write() as connection:
            connection.execute(sa.update(sites).where(sites.c.name == site).values(seen_at=0.0))

    def sites(self) -> list[Row]:
        """Return the enrolled sites by name."""
        return self._all(sa.select(sites).order_by(sites.c.name))

    def present(self, since: float) -> list[str]:
        """Return by name the sites that were heard since a time."""
        return [row.name for row in self._all(sa.select(sites.c.name).where(sites.c.seen_at >= since).order_by("name"))]


def _is(key: Key) -> list[sa.ColumnElement[bool]]:
    return [tasks.c[name] == value for name, value in key._asdict().items()]


def _named(key: Key) -> dict[str, Any]:
    return {f"its_{name}": value for name, value in key._asdict().items()}


def _why(key: Key, state: str, message: str) -> SiteState:
    return SiteState(round=key.round + 1, site=key.site, state=state, message=message)
