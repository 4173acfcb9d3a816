"""What a run's sites are held to, so as not to forget: made once, of the version that the run goes on from."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from offsite.coordinator.aggregation.base import RETENTION
from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.runs.steps.storage import load_version
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Blobs, Stored
from offsite.emulator import retention
from offsite.kernels.schema import Schema, Tier
from offsite.protos.errors import InputError
from offsite.protos.spec import TrainingSpec


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
    state = {name.removeprefix(RETENTION): kept for name, kept in last.state.items() if name.startswith(RETENTION)}
    try:
        kept = held.remember(last.adapter, schema, state)
        anchors = {tier: held.anchor(sent, schema, kept) for tier, sent in last.broadcast.items()}
    except ValueError as error:
        raise InputError(f"training.retention: {error}") from error
    new = {name: tensors for name, tensors in kept.items() if tensors is not state.get(name)}
    stored = {f"{RETENTION}{name}": store_adapter(blobs, file, tensors).digest for name, tensors in new.items()}
    anchored: Mapping[Tier, Stored] = {tier: store_adapter(blobs, file, one) for tier, one in anchors.items() if one}
    return replace(version, state={**version.state, **stored}), dict(anchored)
