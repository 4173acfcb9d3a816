"""Whether an update is let in: what it says of itself, what it is made of, and how far it went."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from offsite.kernels.schema import Rule, Schema, is_judged_by_value, rules
from offsite.protos import tensors, upload
from offsite.protos.errors import MismatchError
from offsite.protos.spec import TaskSpec, UpdateMetrics
from offsite.protos.upload.base import Stage
from offsite.protos.upload.change import Change
from offsite.protos.upload.files import Reach, reach, settled


def described(task: TaskSpec, site: str = "") -> str:
    """Name the update of a task in messages, or that of another site's like it."""
    return f"update of {site or task.site}, round {task.round + 1}"


def admit(
    file: Path, task: TaskSpec, schema: Schema, *, broadcast: Path, max_norm: float, change: Change | None = None
) -> float:
    """Return how far an update has changed, in L2 norm; raises MismatchError unless it is what a task asked for.

    Args:
        file: the update.
        task: what was asked for.
        schema: what of the run's adapters the task trains, before its stages pack it.
        broadcast: the adapter that the task starts from.
        max_norm: L2 norm of the largest change since the broadcast that is let in.
        change: what was seen of it as it came, where no stage packed it.
    """
    what = described(task)
    _check_origin(tensors.about(file), task)
    stages = upload.make(task.upload)
    seen = change.norm(file) if change and not stages else None
    with tensors.reading(file) as update, tensors.reading(broadcast) as start:
        return judge(update, start, settled(schema, broadcast), stages, max_norm=max_norm, what=what, seen=seen)


def judge(
    update: tensors.Source,
    broadcast: tensors.Source,
    schema: Schema,
    stages: Sequence[Stage],
    *,
    max_norm: float,
    what: str,
    seen: float | None = None,
) -> float:
    """Return how far an update has changed, wherever it is read from; raises MismatchError unless it may be let in.

    Args:
        update: its tensors, as the stages packed them.
        broadcast: those that it starts from.
        schema: settled, of what the stages were given.
        stages: what packed it.
        max_norm: L2 norm of the largest change that is let in. It does not hold for sums, nor for bits that are voted
            on, of which a site cannot change more than all and by which none gets more than its weight.
        what: names it in messages.
        seen: the norm, if it is known already.
    """
    packed = upload.schema_of(stages, schema)
    tensors.check_entries(update.entries, packed, what=what)
    return judge_values(update, broadcast, schema, stages, packed, max_norm=max_norm, what=what, seen=seen)


def judge_values(
    update: tensors.Source,
    broadcast: tensors.Source,
    schema: Schema,
    stages: Sequence[Stage],
    packed: Schema,
    *,
    max_norm: float,
    what: str,
    seen: float | None = None,
) -> float:
    """Do the same for an update whose tensors are those of `packed`, which the stages make of the schema."""
    fixed = {name: broadcast[name] for name, field in packed.items() if field.rule is Rule.FIXED}
    chosen = is_judged_by_value(schema)
    if stages or chosen:
        tensors.check_values(update, packed, fixed=fixed, what=what)
    try:
        change = reach(update, broadcast, schema, stages) if seen is None else Reach(seen)
    except ValueError as error:
        raise MismatchError(f"{what}: {error}") from error
    if not (stages or chosen) and (fixed or not math.isfinite(change.norm)):
        tensors.check_values(update, packed, fixed=fixed, what=what)  # says where
    if Rule.SUM not in rules(schema) and not change.values <= max_norm:  # a sum is as large as what it is of
        raise MismatchError(f"{what}: changed by a norm of {change.values:.3g}, the run allows {max_norm:g}")
    return change.norm


def admit_metrics(metrics: UpdateMetrics, task: TaskSpec, *, site: str = "") -> None:
    """Raise MismatchError if a site says that it saw more than it was asked to; its weight depends on it.

    It is the task's, or another one that was asked for the same.
    """
    what, most = described(task, site), task.training.steps * task.training.batch_size
    if metrics.examples > most:
        raise MismatchError(f"{what}: says it saw {metrics.examples} examples, {most} at most were asked for")
    if metrics.losses and len(metrics.losses) != task.training.steps:
        raise MismatchError(f"{what}: tells {len(metrics.losses)} losses of {task.training.steps} steps")


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
