"""Versions and schemas from files and into them: how steps hand them on."""

import math
from pathlib import Path

from offsite.coordinator import aggregation
from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Blobs
from offsite.kernels.schema import Schema
from offsite.protos import tensors
from offsite.protos.documents import to_json
from offsite.protos.ranges import finite


def load_version(blobs: Blobs, version: Version) -> aggregation.Version:
    """Read all tensors of a version."""
    return aggregation.Version(
        adapter=tensors.load(blobs.served(version.adapter)),
        broadcast={tier: tensors.load(blobs.served(sent.digest)) for tier, sent in version.broadcast.items()},
        state={name: tensors.load(blobs.served(digest)) for name, digest in version.state.items()},
        figures={name: figure for name, figure in version.figures.items() if figure is not None},
        sums={name: {group: _number(value) for group, value in sums.items()} for name, sums in version.sums.items()},
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def store_version(blobs: Blobs, scratch: Path, version: aggregation.Version, *, part: bool = False) -> Version:
    """Write a version's tensors, or those of a part of it, by way of a folder of scratch files."""
    file = scratch / "version.safetensors"
    adapter = store_adapter(blobs, file, version.adapter)
    return Version(
        adapter=adapter.digest,
        broadcast={
            tier: adapter if sent is version.adapter else store_adapter(blobs, file, sent)
            for tier, sent in version.broadcast.items()
        },
        state={name: store_adapter(blobs, file, kept).digest for name, kept in version.state.items()},
        figures={name: finite(figure) for name, figure in version.figures.items()},
        sums={name: {group: finite(value) for group, value in sums.items()} for name, sums in version.sums.items()}
        if part
        else {},
    )


def store_schema(blobs: Blobs, scratch: Path, schema: Schema) -> str:
    """Write what a run's adapters are made of; return the digest."""
    file = scratch / "schema.json"
    file.write_bytes(to_json(schema))
    return blobs.take(file)[0]
