"""What counts as progress of a task, and how often it is told: only what was not reached before, ever more seldom."""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from offsite.coordinator.store.journal import OPEN, Key, Move, Row
from offsite.protos.events import SiteState
from offsite.protos.spec import EXAMS

WRITE_EVERY_S = 1.0  # a task's row
NOTHING: Mapping[str, Any] = MappingProxyType({})
FORGET_S = 3600.0  # a task that is over may end without another word
OLDER = 1.01  # and its event: when the task has become older by this factor, some 1,200 in a day


def ahead(task: Row, *, state: str, step: int, received: int) -> bool:
    """Tell whether a report is beyond the best that a task has reached: by state, then step, then bytes received."""
    return (OPEN.index(state), step, received) > (OPEN.index(task.state), task.step, task.bytes_down)


class Pace:
    """How often the journal is told of each open task; what is over is let go of with `forget`."""

    def __init__(self) -> None:
        self._tasks: dict[Key, tuple[float, float, float]] = {}  # first report, last write, last event
        self._swept = time.time()

    def __len__(self) -> int:
        """Return of how many tasks there is state."""
        return len(self._tasks)

    def forget(self, key: Key) -> None:
        """Let go of a task that is over."""
        self._tasks.pop(key, None)

    def move(self, key: Key, task: Row, *, also: Mapping[str, Any] = NOTHING, **progress: Any) -> Move | None:
        """Return how progress of an open task is to be recorded; None if it is not time to.

        What `also` holds goes into the event alone.
        """
        now, rises = time.time(), progress["state"] != task.state
        self._sweep(now)
        first, written, event_at = self._tasks.get(key, (now, 0.0, 0.0))
        if not rises and now - written < WRITE_EVERY_S:
            return None
        event = None
        if key.round < EXAMS and (rises or now - event_at >= max(WRITE_EVERY_S, (OLDER - 1) * (now - first))):
            event_at, event = now, SiteState(round=key.round + 1, site=key.site, **progress, **also)
        self._tasks[key] = first, now, event_at
        return Move(key, {"moved_at": now, **progress}, event)

    def _sweep(self, now: float) -> None:
        """Let go, now and then, of tasks of which nothing was heard for long."""
        if now - self._swept > FORGET_S:
            self._swept = now
            self._tasks = {key: times for key, times in self._tasks.items() if now - times[1] < FORGET_S}
