"""What the memory of a run makes of its versions, in the steps that give them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from offsite.coordinator import aggregation, memory
from offsite.coordinator.aggregation.base import KEPT, RETENTION, Origin
from offsite.coordinator.bundles.stored import recovered
from offsite.coordinator.memory import PREFIX, SUMS, Combine, Moment
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.orders import Evaluate, Gate, Publish
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Blobs
from offsite.emulator import methods
from offsite.emulator.methods import Adapter
from offsite.emulator.methods.base import Carrying, takes
from offsite.emulator.routing.tasks import Tasks
from offsite.kernels.schema import Schema
from offsite.protos import tensors
from offsite.protos.errors import InputError


def begin(blobs: Blobs, scratch: Path, spec: Grant, version: Version, start: Version, schema: Schema) -> Version:
    """Return what a run begins from, given the version that it goes on from, or its start, and this start itself.

    A run whose method carries another's adapter hands on what is remembered with that.
    """
    own = memory.make(spec.memory.name, spec.memory.settings)
    if own.accumulates:
        last = load_version(blobs, version)
        begun = own.begin(last, load_version(blobs, start), schema, _moment(spec, 0))
        own_version = store_version(blobs, scratch, _handed_on(spec, last, begun, schema))
        return replace(own_version, state={**own_version.state, **_known(spec)})
    if _carries(spec):
        return version
    return replace(version, state={name: kept for name, kept in version.state.items() if not name.startswith(PREFIX)})


def after(
    blobs: Blobs, spec: Grant, last: Version, new: aggregation.Version, schema: Schema, *, number: int
) -> aggregation.Version:
    """Return what a round ends in, given what it began from and what its fold gave.

    `number` is that of the round, from 0, counted with those of the runs that this one goes on from.
    """
    own = memory.make(spec.memory.name, spec.memory.settings)
    if not own.accumulates and last.bare == last:
        return new
    before = load_version(blobs, last)
    version = own.after(before, new, schema, _moment(spec, number - spec.rounds_before + 1))
    version = _handed_on(spec, new, version, schema)
    kept = KEPT if _carries(spec) else (RETENTION, SUMS)
    others = [name for name in before.state if name.startswith(kept)]
    return replace(version, state=version.state | {name: before.state[name] for name in others})


def experts(blobs: Blobs, spec: Grant, order: Evaluate | Gate | Publish) -> dict[str, Adapter]:
    """Return by name the adapters by which a version answers, as they are recovered: the first is the newest.

    It has none, and so the base is as it is, where the order names no adapter.
    """
    if order.adapter is None:
        return {}
    version = aggregation.Version(
        adapter=tensors.load(blobs.path(order.adapter)),
        broadcast={},
        state={name: tensors.load(blobs.path(digest)) for name, digest in order.memory.items()},
    )
    method = methods.make(spec.method.name, spec.method.settings)
    adapters = memory.make(spec.memory.name, spec.memory.settings).experts(version)
    return {name: recovered(blobs, method, one, order.recovery) for name, one in adapters.items()}


def combine(spec: Grant) -> Combine:
    """Return how they answer together."""
    return memory.make(spec.memory.name, spec.memory.settings).combine


def tasks(blobs: Blobs, spec: Grant, order: Evaluate | Publish) -> Tasks | None:
    """Return what the tasks that a version answers for are known by; None where they go by their names."""
    if spec.known is None:
        return None
    method: Any = methods.make(spec.known.method.name, spec.known.method.settings)
    files = {name.removeprefix(SUMS): digest for name, digest in order.memory.items() if name.startswith(SUMS)}
    return Tasks(method, {task: tensors.load(blobs.path(digest)) for task, digest in sorted(files.items())})


def _known(spec: Grant) -> dict[str, str]:
    """Return by its name what a run's own task is known by; raises InputError where no run can be named."""
    if spec.known_by and spec.known is None:
        raise InputError("known_by names a run of a coordinator, and there are none here; leave it out")
    return {SUMS + spec.task: spec.known.sums} if spec.known else {}


def _handed_on(
    spec: Grant, given: aggregation.Version, made: aggregation.Version, schema: Schema
) -> aggregation.Version:
    """Have sites start from what a memory made, if it is another adapter than it was given, with their old starts."""
    if made.adapter is given.adapter or made.broadcast is not given.broadcast:
        return made
    tiers = sorted(made.broadcast)
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    fold = strategy.begin(replace(given, state={}), schema)
    fold.add(made.adapter, Origin(memory.PREFIX, tiers[0], 1.0))
    started = fold.finish(tiers)
    return replace(made, broadcast=started.broadcast, state=made.state | started.state)


def _carries(spec: Grant) -> bool:
    return isinstance(methods.make(spec.method.name, spec.method.settings), Carrying)


def _moment(spec: Grant, number: int) -> Moment:
    method = methods.make(spec.method.name, spec.method.settings)
    return Moment(
        round=number,
        rounds=spec.rounds,
        steps=spec.training.steps,
        before=0 if takes(method) else spec.rounds_before,  # what begins from sums goes on from no adapter
        task=spec.task,
    )
