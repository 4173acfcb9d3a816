"""Versions that were taken back: they stay where they are, and nobody goes on from them."""

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import Row, event_row, steps, withdrawals
from offsite.protos.errors import ConflictError
from offsite.protos.events import Withdrawn


class Withdrawals(Database):
    """The table of versions, each a run and a round counted from one, that were taken back."""

    def withdraw(self, versions: Mapping[str, Collection[int]], *, by: str, reason: str) -> None:
        """Take rounds of runs back, all at once, and tell it in the events of these; the first who did it stays.

        Raises ConflictError if a run that is none of them has gone on from one. Nobody submits one meanwhile.
        """
        with self._write() as connection:
            for run, round in ((run, round) for run, rounds in versions.items() for round in rounds):
                row = self._insert(withdrawals).values(run=run, round=round, at=time.time(), by=by, reason=reason)
                if connection.execute(row.on_conflict_do_nothing()).rowcount:
                    connection.execute(event_row(run, Withdrawn(round=round, by=by, reason=reason)))
            # Only now, as in SQLite a transaction begins with its first write.
            for other, (run, round) in _origins(connection.execute(_GRANTED)).items():
                if other not in versions and round in versions.get(run, ()):
                    words = f"run {other} has just gone on from {run}:{round}; cancel it or wait for its end"
                    raise ConflictError(f"{words}, and roll back then")

    def withdrawn(self, runs: Iterable[str]) -> dict[tuple[str, int], Row]:
        """Return what was taken back of some runs, by run and round."""
        query = sa.select(withdrawals).where(withdrawals.c.run.in_(list(runs)))
        return {(row.run, row.round): row for row in self._all(query)}

    def origins(self) -> dict[str, tuple[str, int]]:
        """Return by run the version that it went on from, a run and a round counted from one, of all that did."""
        return _origins(self._all(_GRANTED))


_CONTINUES: Any = steps.c.value["continues"]
_GRANTED = sa.select(steps.c.run, _CONTINUES.label("continues")).where(steps.c.name == "granted")


def _origins(rows: Iterable[Any]) -> dict[str, tuple[str, int]]:
    return {row.run: (row.continues["run"], row.continues["round"]) for row in rows if row.continues}
