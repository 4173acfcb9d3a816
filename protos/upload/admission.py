"""Whether an update is let in: what it says of itself, what it is made of, and how far it went."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from offsite.kernels.schema import Rule, Schema, settle
from offsite.protos import tensors, upload
from offsite.protos.errors import MismatchError
from offsite.protos.spec import TaskSpec, UpdateMetrics
from offsite.protos.upload.base import Stage
from offsite.protos.upload.change import Change
from offsite.protos.upload.files import distance


def described(task: TaskSpec) -> str:
    """Name a task's update in messages."""
    return f"update of {task.site}, round {task.round + 1}"


def admit(
    file: Path, task: TaskSpec, schema: Schema, *, broadcast: Path, max_norm: float, change: Change | None = None
) -> None:
    """Raise MismatchError unless a file is an update that a task asked for.

    Args:
        file: the update.
        task: what was asked for.
        schema: what the adapters of the run are made of, before the task's stages pack one.
        broadcast: the adapter that the task starts from.
        max_norm: L2 norm of the largest change since the broadcast that is let in.
        change: what was seen of it as it came, where no stage packed it.
    """
    what = described(task)
    _check_origin(tensors.about(file), task)
    settled = settle(schema, {name: entry.shape for name, entry in tensors.header(broadcast).items()})
    stages = upload.make(task.upload)
    if stages:
        norm = _unpacked_norm(file, stages, settled, broadcast, what)
    else:
        norm = _norm(file, settled, broadcast, change, what)
    if not norm <= max_norm:
        raise MismatchError(f"{what}: changed by a norm of {norm:.3g}, the run allows {max_norm:g}")


def _norm(file: Path, schema: Schema, broadcast: Path, change: Change | None, what: str) -> float:
    """Return how far an adapter that left as it is has changed; raises MismatchError if it is none of the schema."""
    tensors.check_header(file, schema, what=what)
    norm = change.norm(file) if change else None
    if norm is None:
        norm = tensors.distance(file, broadcast)
    fixed = [name for name, field in schema.items() if field.rule is Rule.FIXED]
    if fixed or not math.isfinite(norm):
        tensors.check(file, schema, fixed=tensors.load(broadcast, fixed), what=what)  # says where
    return norm


def _unpacked_norm(file: Path, stages: Sequence[Stage], schema: Schema, broadcast: Path, what: str) -> float:
    """Return how far an adapter that was packed has changed; raises MismatchError if no site can have packed it."""
    packed = upload.schema_of(stages, schema)
    fixed = tensors.load(broadcast, [name for name, field in packed.items() if field.rule is Rule.FIXED])
    tensors.check(file, packed, fixed=fixed, what=what)
    try:
        return distance(file, broadcast, schema, stages)
    except ValueError as error:
        raise MismatchError(f"{what}: {error}") from error


def admit_metrics(metrics: UpdateMetrics, task: TaskSpec) -> None:
    """Raise MismatchError if a site says that it saw more than it was asked to; its weight depends on it."""
    most = task.training.steps * task.training.batch_size
    if metrics.examples > most:
        raise MismatchError(
            f"{described(task)}: says it saw {metrics.examples} examples, {most} at most were asked for"
        )
    if metrics.losses and len(metrics.losses) != task.training.steps:
        raise MismatchError(f"{described(task)}: tells {len(metrics.losses)} losses of {task.training.steps} steps")


def _check_origin(about: dict[str, str], task: TaskSpec) -> None:
    """Refuse an update that starts from another broadcast, or comes from another method."""
    try:
        origin = json.loads(about.get("offsite", "{}"))
    except ValueError:
        origin = None
    if not isinstance(origin, dict):
        origin = {}
    for name, digest in (("broadcast", task.adapter), ("method_hash", task.method_hash)):
        if origin.get(name) != digest:
            raise MismatchError(f"{described(task)}: its {name} is {origin.get(name)}, expected {digest}")
