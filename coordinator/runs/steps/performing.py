"""Doing a step by name, in whatever process: bytes in, bytes out."""

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.attacking import attack
from offsite.coordinator.runs.steps.building import build, realign
from offsite.coordinator.runs.steps.dividing import divide, encode
from offsite.coordinator.runs.steps.evaluation import evaluate
from offsite.coordinator.runs.steps.folding import aggregate, compare, join
from offsite.coordinator.runs.steps.gathering import gather
from offsite.coordinator.runs.steps.gating import gate
from offsite.coordinator.runs.steps.inputs import at_desk, desks
from offsite.coordinator.runs.steps.orders import read
from offsite.coordinator.runs.steps.publishing import publish
from offsite.coordinator.runs.steps.tuning import tune
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import InputError, OffsiteError, ResourceError, from_system

STEPS: dict[str, Callable[[Node, Grant, Any], object]] = {
    "gather": gather,
    "build": build,
    "divide": divide,
    "encode": encode,
    "realign": realign,
    "aggregate": aggregate,
    "compare": compare,
    "join": join,
    "evaluate": evaluate,
    "attack": attack,
    "tune": tune,
    "publish": publish,
    "gate": gate,
}


def perform(node: Node, step: str, spec: bytes, order: bytes) -> bytes:
    """Do one step by name and return its result as a document; raises OffsiteError where users can act on it."""
    grant = from_json(Grant, spec, where="run spec")
    with at_desk(node) as node:
        try:
            return to_json(STEPS[step](node, grant, read(step, order)))
        except Exception as error:
            known = _in_words(error, step)
            if known is None:
                raise
            raise type(known)(_told(node, grant, error, str(known)), reason=known.reason) from None


def _told(node: Node, grant: Grant, error: Exception, sentence: str) -> str:
    """Say what went wrong as the run's people know its places, wherever this node has them."""
    names = dict(grant.names)
    for place, path in desks(node, grant).items():
        sentence, names[path] = sentence.replace(path, place), names.get(place, place)
    return replace(grant, names=names).wording(error, sentence)


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
