"""What counts as progress of a task, and how often it is told: only what was not reached before, ever more seldom."""

import time
from typing import Any

from offsite.coordinator.store.journal import OPEN, Journal, Key, Row
from offsite.protos.events import SiteState

WRITE_EVERY_S = 1.0  # a task's row
FORGET_S = 3600.0  # a task that is over may end without another word
OLDER = 1.01  # and its event: when the task has become older by this factor, some 1,200 in a day


def ahead(task: Row, *, state: str, step: int, received: int) -> bool:
    """Tell whether a report is beyond the best that a task has reached: by state, then step, then bytes received."""
    return (OPEN.index(state), step, received) > (OPEN.index(task.state), task.step, task.bytes_down)


class Told:
    """When the journal was last told of an open task; forgotten with `forget` once it is over."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._tasks: dict[Key, tuple[float, float, float]] = {}  # first report, last write, last event

    def __len__(self) -> int:
        """Return of how many tasks there is state."""
        return len(self._tasks)

    def forget(self, key: Key) -> None:
        """Let go of a task that is over."""
        self._tasks.pop(key, None)

    def tell(self, key: Key, task: Row, **progress: Any) -> bool:
        """Record progress of an open task, if it is time to; False when the task is closed."""
        now, rises = time.time(), progress["state"] != task.state
        if key not in self._tasks:
            self._tasks = {one: times for one, times in self._tasks.items() if now - times[1] < FORGET_S}
        first, written, told = self._tasks.get(key, (now, 0.0, 0.0))
        if not rises and now - written < WRITE_EVERY_S:
            return True
        event = None
        if rises or now - told >= max(WRITE_EVERY_S, (OLDER - 1) * (now - first)):
            told, event = now, SiteState(round=key.round + 1, site=key.site, **progress)
        if not self._journal.set_task(key, event, moved_at=now, **progress):
            return False
        self._tasks[key] = first, now, told
        return True
