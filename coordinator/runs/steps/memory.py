"""What the memory of a run makes of its versions, in the steps that give them."""

from dataclasses import replace
from pathlib import Path

from offsite.coordinator import aggregation, memory
from offsite.coordinator.aggregation.base import KEPT
from offsite.coordinator.memory import PREFIX, Moment
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Blobs
from offsite.emulator import methods
from offsite.emulator.methods.base import takes
from offsite.kernels.schema import Schema


def begin(blobs: Blobs, scratch: Path, spec: Grant, version: Version, schema: Schema) -> Version:
    """Return what a run begins from, given the version that it goes on from, or the one that changes nothing."""
    own = memory.make(spec.memory.name, spec.memory.settings)
    if own.accumulates:
        return store_version(blobs, scratch, own.begin(load_version(blobs, version), schema, _moment(spec, 0)))
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
    others = [name for name in before.state if name.startswith(KEPT) and not name.startswith(PREFIX)]
    return replace(version, state=version.state | {name: before.state[name] for name in others})


def _moment(spec: Grant, number: int) -> Moment:
    method = methods.make(spec.method.name, spec.method.settings)
    return Moment(
        round=number,
        rounds=spec.rounds,
        steps=spec.training.steps,
        before=0 if takes(method) else spec.rounds_before,  # what begins from sums goes on from no adapter
        task=spec.task,
    )
