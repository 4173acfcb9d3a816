"""Building a run's emulator on several nodes: what is done before and beside `building.build`, which finishes it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from offsite.coordinator.bundles import division
from offsite.coordinator.bundles.building import grounds_told
from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.building import build, outline, texts
from offsite.coordinator.runs.steps.inputs import here
from offsite.coordinator.runs.steps.orders import Divide, Encode, Outlined
from offsite.coordinator.runs.steps.results import Division, Encoded
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.protos import tensors


def divide(node: Node, spec: Grant, order: Divide) -> Division:
    """Choose the layers and look at the text, once for all nodes; build the emulator if it cannot be divided."""
    timeline = Timeline()
    with timeline.span("building"):
        begun = division.begin(here(node, spec, spec.model), spec.builders, spec.trainable, texts(node, spec))
        if begun is None:
            return Division(built=build(node, spec, order.build))
        with TemporaryDirectory(dir=node.scratch) as scratch:
            weights = store_adapter(node.blobs(), Path(scratch) / "weights.safetensors", begun.weights)
    chosen = begun.outline
    outlined = Outlined(
        layers=chosen.layers, trainable=chosen.trainable, shared=chosen.shared, grounds=grounds_told(chosen.grounds)
    )
    return Division(outline=outlined, weights=weights.digest, places=begun.places, spans=tuple(timeline))


def encode(node: Node, spec: Grant, order: Encode) -> Encoded:
    """Encode the maps of some places, and store what they are stored as."""
    timeline, blobs = Timeline(), node.blobs()
    with timeline.span("building"), TemporaryDirectory(dir=node.scratch) as scratch:
        encoded = division.encode(
            here(node, spec, spec.model),
            spec.builders,
            outline(order.outline),
            tensors.load(blobs.path(order.weights)),
            part=order.part,
            parts=order.parts,
        )
        file = store_adapter(blobs, Path(scratch) / "encoded.safetensors", encoded).digest
    return Encoded(file=file, spans=tuple(timeline))
