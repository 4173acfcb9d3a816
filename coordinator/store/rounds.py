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

    def overdue(self, run: str, round: int, *, moved_before: float, begun_before: float) -> list[Row]:
        """Return the open tasks of a round that are out of time.

        Args:
            run: the run.
            round: the round, counted from zero.
            moved_before: a task that has not got further since then is overdue. One that is only offered is not, as
                long as its site is here: it may be busy with another run.
            begun_before: so is one whose site was first heard of in the round before then, at whichever attempt; its
                row has `late`.
        """
        is_open = tasks.c.run == run, tasks.c.round == round, tasks.c.state.in_(OPEN)
        here = sa.select(sites.c.seen_at).where(sites.c.name == tasks.c.site).scalar_subquery()
        busy = sa.and_(tasks.c.state == "offered", here >= moved_before)
        heard = events.c.run == run, events.c.round == round + 1, events.c.site == tasks.c.site
        late = sa.select(sa.func.min(events.c.at)).where(*heard).scalar_subquery() < begun_before
        stuck = sa.and_(tasks.c.moved_at < moved_before, ~sa.func.coalesce(busy, False))
        return self._all(sa.select(tasks, late.label("late")).where(*is_open, sa.or_(stuck, late)))
