"""What a run's sites are held to, so as not to forget: made once, of the version that the run goes on from."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from offsite.coordinator.aggregation.base import KEPT, RETENTION
from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.runs.steps.orders import Continued
from offsite.coordinator.runs.steps.storage import load_version
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Blobs, Stored
from offsite.emulator import methods, retention
from offsite.emulator.methods import Method
from offsite.emulator.methods.base import Carrying
from offsite.kernels.schema import Schema, Tier
from offsite.protos import tensors
from offsite.protos.errors import InputError
from offsite.protos.spec import TrainingSpec


def unfolded(blobs: Blobs, scratch: Path, continued: Continued) -> Continued:
    """Return a version as runs of the method go on from it, where it is that of a run that measured at its adapter.

    What was measured is remembered then. Raises InputError where nothing was.
    """
    if continued.method is None:
        return continued
    method = methods.make(continued.method.name, continued.method.settings)
    if not isinstance(method, Carrying):
        return continued
    version, name, file = continued.version, f"{RETENTION}{method.gives}", scratch / "retention.safetensors"
    earlier = tensors.load(blobs.path(version.state[name])) if name in version.state else {}
    try:
        adapter, measured = method.apart(tensors.load(blobs.path(version.adapter)), earlier)
    except ValueError as error:
        raise InputError(f"start: {error}") from error
    stored = store_adapter(blobs, file, adapter)
    state = {**version.state, name: store_adapter(blobs, file, measured).digest}
    own = replace(version, adapter=stored.digest, broadcast=dict.fromkeys(version.broadcast, stored), state=state)
    return replace(continued, version=own)


def kept(version: Version, method: Method) -> dict[str, str]:
    """Return what is remembered with a version, for a run that goes on from it without its adapter's being its own.

    What a memory keeps is of adapters, and goes on with one that the run's method carries.
    """
    names = KEPT if isinstance(method, Carrying) else RETENTION
    return {name: digest for name, digest in version.state.items() if name.startswith(names)}


def retain(
    blobs: Blobs, scratch: Path, training: TrainingSpec, version: Version, schema: Schema
) -> tuple[Version, dict[Tier, Stored]]:
    """Return the version that a run goes on from with what is remembered of it, and the anchor of each tier.

    Raises InputError where the retention cannot be of this version.
    """
    held = retention.make(training.retention.name, training.retention.settings)
    if not held.starts:  # without a start there is nothing to hold to: see `runs.legality`
        return version, {}
    last, file = load_version(blobs, version), scratch / "retention.safetensors"
    state = {name.removeprefix(RETENTION): own for name, own in last.state.items() if name.startswith(RETENTION)}
    try:
        remembered = held.remember(last.adapter, schema, state)
        anchors = {tier: held.anchor(sent, schema, remembered) for tier, sent in last.broadcast.items()}
    except ValueError as error:
        raise InputError(f"training.retention: {error}") from error
    new = {name: own for name, own in remembered.items() if own is not state.get(name)}
    stored = {f"{RETENTION}{name}": store_adapter(blobs, file, own).digest for name, own in new.items()}
    anchored: Mapping[Tier, Stored] = {tier: store_adapter(blobs, file, one) for tier, one in anchors.items() if one}
    return replace(version, state={**version.state, **stored}), dict(anchored)
