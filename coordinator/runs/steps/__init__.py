"""The heavy steps of a run, each a function of plain data, run in a worker process.

A step reads and writes files by digest and returns what the journal keeps. Running one twice gives the same result.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.building import build, realign
from offsite.coordinator.runs.steps.evaluation import evaluate
from offsite.coordinator.runs.steps.folding import aggregate
from offsite.coordinator.runs.steps.publishing import publish
from offsite.protos.documents import from_json
from offsite.protos.errors import InputError, OffsiteError, ResourceError, from_system

STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "build": build,
    "realign": realign,
    "aggregate": aggregate,
    "evaluate": evaluate,
    "publish": publish,
}


def perform(step: str, root: str, identity: str, spec: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do one step by name; an error that users can act on comes back as {"error": {"status", "message"}}."""
    home = Home(Path(root), Path(identity)).prepare()
    grant = from_json(Grant, spec, where="run spec")
    try:
        return STEPS[step](home, grant, **arguments)
    except Exception as error:
        known = _in_words(error, step)
        if known is None:
            raise
        return {"error": {"status": known.status, "message": grant.told(error, str(known))}}


def _in_words(error: Exception, step: str) -> OffsiteError | None:
    """Return what a user can act on; None for a fault of ours. Libraries wrap what the system says, in many ways."""
    if isinstance(error, OffsiteError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return ResourceError(f"memory is missing for the step {step!r}; give it more, or take a smaller model or batch")
    if "No space left on device" in str(error):
        return from_system(OSError(errno.ENOSPC, "", getattr(error, "filename", None)))
    if isinstance(error, OSError):
        return from_system(error)
    return InputError(str(error)) if isinstance(error, ValueError) else None
