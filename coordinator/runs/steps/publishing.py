"""Writing a run's outcome."""

from pathlib import Path
from tempfile import TemporaryDirectory

from offsite.coordinator.bundles.stored import recovered
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.inputs import the_base
from offsite.coordinator.runs.steps.orders import Publish
from offsite.coordinator.runs.steps.results import Publication
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.store.blobs import Stored, room
from offsite.emulator import methods, zoo
from offsite.protos import tensors


def publish(node: Node, spec: Grant, order: Publish) -> Publication:
    """Write the outcome as an adapter of the base (LoRA as peft does) and, if asked for, the merged model."""
    timeline = Timeline()
    blobs = node.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    source = the_base(node, spec, order.base)
    with timeline.span("loading"):
        model, tokenizer = zoo.load_base(source, dtype="auto")
    adapter = recovered(blobs, method, tensors.load(blobs.path(order.adapter)), order.recovery)
    files: dict[str, Stored] = {}
    with TemporaryDirectory(dir=node.scratch) as scratch:
        method.export(Path(scratch) / "adapter", adapter, base=model, base_name=spec.base_name or spec.model)
        if spec.merge:
            room(node.root, 2 * sum(parameter.nbytes for parameter in model.parameters()))
            method.merge(model, adapter)
            model.save_pretrained(Path(scratch) / "merged")
            tokenizer.save_pretrained(Path(scratch) / "merged")
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            name = path.relative_to(scratch).as_posix()
            digest, size = blobs.take(path)
            files[name] = Stored(digest=digest, size=size)
    return Publication(artifacts=files, spans=tuple(timeline))
