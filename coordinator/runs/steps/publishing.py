"""Writing a run's outcome."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.inputs import the_base
from offsite.coordinator.runs.steps.orders import Publish
from offsite.coordinator.runs.steps.results import Publication
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.store.blobs import Stored, room
from offsite.emulator import methods, zoo
from offsite.emulator.plug import ENSEMBLE


def publish(node: Node, spec: Grant, order: Publish) -> Publication:
    """Write the outcome as an adapter of the base (LoRA as peft does) and, if asked for, the merged model.

    Where a version answers by several adapters, the others are in folders beside it, and a file says how they do.
    """
    timeline = Timeline()
    blobs = node.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    source = the_base(node, spec, order.base)
    with timeline.span("loading"):
        model, tokenizer = zoo.load_base(source, dtype="auto")
    adapters = memory.experts(blobs, spec, order)
    adapter, *_ = adapters.values()
    files: dict[str, Stored] = {}
    with TemporaryDirectory(dir=node.scratch) as scratch:
        folders = dict(zip(adapters, ["adapter", *(f"experts/{name}" for name in [*adapters][1:])], strict=True))
        for name, folder in folders.items():
            method.export(Path(scratch) / folder, adapters[name], base=model, base_name=spec.base_name or spec.model)
        if len(folders) > 1:
            together = {"combine": memory.combine(spec), "experts": folders}
            (Path(scratch) / ENSEMBLE).write_text(json.dumps(together, indent=2) + "\n")
        if known := memory.tasks(blobs, spec, order):
            known.save(Path(scratch))
        if spec.merge and not order.folder:
            room(node.root, 2 * sum(parameter.nbytes for parameter in model.parameters()))
            method.merge(model, adapter)
            model.save_pretrained(Path(scratch) / "merged")
            tokenizer.save_pretrained(Path(scratch) / "merged")
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            place = Path(order.folder) / path.relative_to(scratch)
            digest, size = blobs.take(path)
            files[place.as_posix()] = Stored(digest=digest, size=size)
    return Publication(artifacts=files, spans=tuple(timeline))
