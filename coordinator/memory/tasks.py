"""What is kept by task: in a version's state, `memory.now.TASK` of the last one and `memory.task.TASK` of each other.

Bytes that are kept of a task are handed on as they are, until it is learned again.
"""

from offsite.coordinator.aggregation.base import KEPT, Version
from offsite.coordinator.memory.base import PREFIX
from offsite.kernels.schema import Tensors

NOW, TASK = PREFIX + "now.", PREFIX + "task."
EARLIER = "earlier"  # the task of what was learned without a memory of this kind, whose name is not known


def current(version: Version) -> str:
    """Return the task that a version has learned last; "" if it has none."""
    return next((name.removeprefix(NOW) for name in version.state if name.startswith(NOW)), "")


def others(version: Version) -> dict[str, Tensors]:
    """Return what is kept of all tasks but the last one, by their names, which are sorted."""
    return {name.removeprefix(TASK): kept for name, kept in sorted(version.state.items()) if name.startswith(TASK)}


def laid_by(version: Version, own: Tensors) -> dict[str, Tensors]:
    """Return the state of a version whose task is over, of which `own` is kept; what strategies kept was for it."""
    state = {name: kept for name, kept in version.state.items() if name.startswith(KEPT) and not name.startswith(NOW)}
    return state | {TASK + (current(version) or EARLIER): own}


def learned(last: Version, new: Version, task: str, own: Tensors) -> dict[str, Tensors]:
    """Return the state of what a round ends in, of whose task `own` is kept."""
    return new.state | {TASK + name: kept for name, kept in others(last).items()} | {NOW + task: own}
