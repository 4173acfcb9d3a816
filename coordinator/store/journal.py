"""The journal: what happened, durable before it is acknowledged. SQLite in WAL mode.

Nothing else holds state: a supervisor or a server that is killed reads the journal and goes on.
Times are seconds since the epoch. Documents are kept as the bytes that were hashed or signed.
"""

import sqlalchemy as sa

from offsite.coordinator.store.copies import Copies
from offsite.coordinator.store.counts import Counts
from offsite.coordinator.store.gateways import Gateways
from offsite.coordinator.store.memberships import Memberships
from offsite.coordinator.store.rounds import Rounds
from offsite.coordinator.store.runs import Runs, no_run
from offsite.coordinator.store.tables import LIVE, OPEN, Row, event_row, events
from offsite.coordinator.store.tasks import Key, Move, Tasks
from offsite.coordinator.store.withdrawals import Withdrawals
from offsite.protos.events import Event

__all__ = ["LIVE", "OPEN", "Journal", "Key", "Move", "Row", "no_run"]


class Journal(Runs, Tasks, Rounds, Withdrawals, Gateways, Memberships, Copies, Counts):
    """Typed access to the tables; every method is one transaction and may be repeated."""

    def add_event(self, run: str, event: Event) -> None:
        """Tell watchers something that changes nothing else."""
        with self._write() as connection:
            connection.execute(event_row(run, event))

    def events(self, run: str, *, after: int = 0, kind: str = "", most: int | None = None) -> list[Row]:
        """Return the events of a run after a sequence number, the first `most` of them, of one kind if it is named."""
        query = sa.select(events).where(events.c.run == run, events.c.seq > after).order_by(events.c.seq).limit(most)
        return self._all(query.where(events.c.kind == kind) if kind else query)

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
