"""Versions that were taken back: they stay where they are, and nobody goes on from them."""

import time
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import Row, event_row, steps, withdrawals
from offsite.protos.events import Withdrawn


class Withdrawals(Database):
    """The table of versions, each a run and a round counted from one, that were taken back."""

    def withdraw(self, versions: Iterable[tuple[str, int]], *, by: str, reason: str) -> None:
        """Take versions back, all at once, and tell it in the events of their runs; the first who did it stays."""
        with self._write() as connection:
            for run, round in versions:
                row = self._insert(withdrawals).values(run=run, round=round, at=time.time(), by=by, reason=reason)
                if connection.execute(row.on_conflict_do_nothing()).rowcount:
                    connection.execute(event_row(run, Withdrawn(round=round, by=by, reason=reason)))

    def withdrawn(self, runs: Iterable[str]) -> dict[tuple[str, int], Row]:
        """Return what was taken back of some runs, by run and round."""
        query = sa.select(withdrawals).where(withdrawals.c.run.in_(list(runs)))
        return {(row.run, row.round): row for row in self._all(query)}

    def origins(self) -> dict[str, tuple[str, int]]:
        """Return by run the version that it went on from, a run and a round counted from one, of all that did."""
        begun: Any = steps.c.value["continues"]
        query = sa.select(steps.c.run, begun.label("continues")).where(steps.c.name == "granted")
        return {row.run: (row.continues["run"], row.continues["round"]) for row in self._all(query) if row.continues}
