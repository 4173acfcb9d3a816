"""A journal taken over into another one, of whichever database, and how runs go on there."""

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import LIVE, OPEN, event_values, events, gateways, leaders, metadata, runs, tasks
from offsite.protos.errors import ConflictError
from offsite.protos.events import Warned

COPIED = [table for table in metadata.sorted_tables if table not in (gateways, leaders)]  # those tell who is up
ROWS = 1000  # in memory at once
# Numbers of events that were given out after the copy was made, and seen by somebody, are not given out again.
GAP = 10**6


class Copies(Database):
    """Copies of all tables."""

    @property
    def empty(self) -> bool:
        """Whether nothing was ever written."""
        with self._read() as connection:
            return _is_empty(connection)

    @property
    def unknown(self) -> list[str]:
        """What another version has added: tables and columns that this one has not."""
        with self._read() as connection:
            every = sa.inspect(connection).get_multi_columns().items()
            mine = {(table.name, column.name) for table in metadata.sorted_tables for column in table.columns}
            theirs = {(str(table), str(one["name"])) for (_, table), all_ in every for one in all_}
            return sorted(f"{table}.{column}" for table, column in theirs - mine)

    def fill(self, other: "Copies") -> dict[str, int]:
        """Take over all rows of another journal, as they are at one moment, all or none; return how many by table.

        Raises ConflictError where there are rows already.
        """
        counts = {}
        with other._frozen() as source, self._write() as connection:
            if not _is_empty(connection):
                raise ConflictError("the journal is in use; name an empty one")
            for table in COPIED:
                rows = source.execution_options(yield_per=ROWS).execute(sa.select(table))
                counts[table.name] = 0
                for part in rows.mappings().partitions():
                    connection.execute(sa.insert(table), [dict(row) for row in part])
                    counts[table.name] += len(part)
            self._dialect.renumber(connection)
        return counts

    def wake(self, news: Warned, *, away_s: float) -> int:
        """Let the runs that are not over go on after so long, which does not count against their sites; tell watchers.

        Returns how many runs these are.
        """
        with self._write() as connection:
            live = list(connection.execute(sa.select(runs.c.id).where(runs.c.state.in_(LIVE))).scalars())
            last = connection.execute(sa.select(sa.func.max(events.c.seq))).scalar_one() or 0
            mine = tasks.c.run == events.c.run, tasks.c.round + 1 == events.c.round, tasks.c.site == events.c.site
            under_way = sa.exists().where(*mine, tasks.c.state.in_(OPEN), tasks.c.run.in_(live))
            connection.execute(sa.update(events).where(under_way).values(at=events.c.at + away_s))
            for number, run in enumerate(live):
                values = event_values(run, news) | {"seq": last + GAP + number}
                connection.execute(sa.insert(events).values(**values))
        return len(live)


def _is_empty(connection: sa.Connection) -> bool:
    return not any(connection.execute(sa.select(table).limit(1)).first() for table in COPIED)
