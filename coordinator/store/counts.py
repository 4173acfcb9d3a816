"""How many there are, for metrics: asked again and again, so each is one short query."""

from typing import Any

import sqlalchemy as sa

from offsite.coordinator.store.database import Database
from offsite.coordinator.store.tables import LIVE, OPEN, runs, steps, tasks


class Counts(Database):
    """Numbers of runs, of tasks, and the steps that were done lately."""

    def runs_by_state(self) -> dict[str, int]:
        """Count the runs in each state."""
        query = sa.select(runs.c.state, sa.func.count().label("runs")).group_by(runs.c.state)
        return {row.state: row.runs for row in self._all(query)}

    def open_tasks_by_state(self) -> dict[str, int]:
        """Count the open tasks of runs that are not over, in each state."""
        query = sa.select(tasks.c.state, sa.func.count().label("tasks")).join(runs, runs.c.id == tasks.c.run)
        query = query.where(tasks.c.state.in_(OPEN), runs.c.state.in_(LIVE)).group_by(tasks.c.state)
        return {row.state: row.tasks for row in self._all(query)}

    def steps_since(self, moment: float) -> set[tuple[str, str]]:
        """Return (run, name) of the steps of all runs that were not over at a time."""
        query = sa.select(steps.c.run, steps.c.name).join(runs, runs.c.id == steps.c.run)
        late = sa.or_(runs.c.state.in_(LIVE), runs.c.finished_at >= moment)
        return {(row.run, row.name) for row in self._all(query.where(late))}

    def step(self, run: str, name: str) -> dict[str, Any]:
        """Return what a step gave; nothing if it is not done."""
        rows = self._all(sa.select(steps.c.value).where(steps.c.run == run, steps.c.name == name))
        return dict(rows[0].value) if rows else {}
