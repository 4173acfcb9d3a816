"""What an agent says, for a log that programs read and may send on: what happened, and no text of the site's."""

import logging
from typing import Any

LEVELS = {"warning": logging.WARNING, "refused": logging.WARNING, "failed": logging.ERROR, "waiting": logging.WARNING}
FIELDS = ("run", "round", "rounds", "step", "steps", "bytes", "told")  # of those that an event may have
MESSAGES = {
    "enrolled": "the coordinator has let this site in",
    "waiting": "waits for the coordinator, or for room on this machine",
    "task": "a task was taken",
    "approval": "a person here is asked, or has decided",
    "data": "the data was looked at",
    "emulator": "the emulator was looked at",
    "identity": "about this site's certificate, see its own log",
    "metrics": "metrics can be asked for",
    "packing": "sequences are not packed: the model does not keep them apart",
    "step": "a step was done",
    "exam": "held-out rows were measured",
    "uploaded": "the update was accepted",
    "measured": "a version was measured on held-out rows",
    "refused": "the task was refused: the policy does not allow it",
    "failed": "the task failed",
    "stopped": "the task was stopped by the coordinator",
    "warning": "a warning",
}
MORE = "; the site's own log says more"

log = logging.getLogger(__name__)


def record(kind: str, data: dict[str, Any]) -> None:
    """Log an event of an agent's."""
    level = LEVELS.get(kind, logging.INFO)
    message = MESSAGES.get(kind, "something was said") + (MORE if level > logging.INFO else "")
    fields = {"kind": kind, **{name: data[name] for name in FIELDS if name in data}}
    log.log(level, message, extra={"fields": fields})
