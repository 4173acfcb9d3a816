"""How a round stands, asked of the journal in a few numbers and not in all of its rows."""

from typing import NamedTuple

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import OPEN, Row, events, sites, tasks


class Standing(NamedTuple):
    """What is left to wait for in a round."""

    open: int  # tasks that may still give an update
    failed: list[Row]  # failed tasks whose sites may be asked once more


class Rounds(Database):
    """Questions about the tasks of one round, counted from zero."""

    def standing(self, run: str, round: int, *, attempts: int) -> Standing:
        """Tell how a round stands whose sites are asked at most so often; asked again and again, so it is cheap."""
        mine = tasks.c.run == run, tasks.c.round == round
        # First: a task that fails after this is still counted, and found among the failed ones at the next look.
        count = self._all(sa.select(sa.func.count()).select_from(tasks).where(*mine, tasks.c.state.in_(OPEN)))[0][0]
        other = tasks.alias()
        again = sa.exists().where(
            other.c.run == run, other.c.round == round, other.c.site == tasks.c.site, other.c.attempt > tasks.c.attempt
        )
        may_again = tasks.c.state == "failed", tasks.c.attempt + 1 < attempts, ~again
        return Standing(open=count, failed=self._all(sa.select(tasks).where(*mine, *may_again)))

    def arrival(self, run: str, round: int, number: int) -> float | None:
        """Return when a round's update of a number, counted from one, came; None if so many are not there yet."""
        came = sa.select(tasks.c.moved_at).where(tasks.c.run == run, tasks.c.round == round)
        rows = self._all(came.where(tasks.c.state == "uploaded").order_by("moved_at").offset(number - 1).limit(1))
        return float(rows[0].moved_at) if rows else None

    def busy(self, run: str, *, before: int) -> set[str]:
        """Return the sites that still work on a task of a run's rounds before one."""
        mine = tasks.c.run == run, tasks.c.round < before, tasks.c.state.in_(OPEN)
        return {row.site for row in self._all(sa.select(tasks.c.site).where(*mine))}

    def overdue(self, run: str, rounds: tuple[int, int], *, moved_before: float, begun_before: float) -> list[Row]:
        """Return the open tasks of some rounds that are out of time.

        Args:
            run: the run.
            rounds: the first and the last round, counted from zero.
            moved_before: a task that has not got further since then is overdue. One that is only offered is not, as
                long as its site is here: it may be busy with another run. Nor is one that waits for a person there.
            begun_before: so is one whose site was first heard of in its round before then, at whichever attempt; its
                row has `late`.
        """
        is_open = tasks.c.run == run, tasks.c.round.between(*rounds), tasks.c.state.in_(OPEN)
        here = sa.select(sites.c.seen_at).where(sites.c.name == tasks.c.site).scalar_subquery()
        busy = sa.and_(tasks.c.state.in_(("offered", "awaiting approval")), here >= moved_before)
        heard = events.c.run == run, events.c.round == tasks.c.round + 1, events.c.site == tasks.c.site
        late = sa.select(sa.func.min(events.c.at)).where(*heard).scalar_subquery() < begun_before
        stuck = sa.and_(tasks.c.moved_at < moved_before, ~sa.func.coalesce(busy, False))
        return self._all(sa.select(tasks, late.label("late")).where(*is_open, sa.or_(stuck, late)))
