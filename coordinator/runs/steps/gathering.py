"""Putting the owner's files that a run reads into the blobs, so that its steps can be done on other machines too.

It is done once, where the files lie: from then on the run reads these bytes, whatever becomes of the files.
"""

from collections.abc import Iterator
from pathlib import Path

from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant, Input
from offsite.coordinator.runs.steps.inputs import folders
from offsite.coordinator.runs.steps.orders import Gather
from offsite.coordinator.runs.steps.results import Inputs
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.store.blobs import Blobs
from offsite.emulator import zoo
from offsite.emulator.examples.files import HARMLESS, paths
from offsite.emulator.zoo.files import files_of
from offsite.protos.errors import InputError
from offsite.protos.spec import FileEntry


def gather(node: Node, spec: Grant, order: Gather) -> Inputs:
    """Put in the model and the texts of a run, but for what is there; raises InputError, and ValueError of a model."""
    timeline, blobs = Timeline(), node.blobs()
    with timeline.span("loading"):
        model = zoo.locate(spec.model, cache=zoo.cache_folder()).absolute()
        places = {spec.model: _input(blobs, model, files_of(model))}
        several = *spec.evaluation.values(), *spec.probes.values()
        for text in sorted({spec.public, spec.calibration, spec.attack_text, *several} - {""}):
            top = Path(text).absolute()
            places[text] = _input(blobs, top, _texts(top, folders(spec)))
    return Inputs(places=places, spans=tuple(timeline))


def _texts(top: Path, within: list[Path]) -> Iterator[Path]:
    """Yield the files of a text that hold examples; raises InputError where its reader would refuse it."""
    for path, fault in paths(top, folders=within):
        if fault is None:
            yield path
        elif fault.reason not in HARMLESS:
            raise InputError(str(fault)) from fault


def _input(blobs: Blobs, source: Path, files: Iterator[Path] | list[Path]) -> Input:
    entries = []
    for file in files:
        digest, size = blobs.share(file)
        entries.append(FileEntry(path=file.relative_to(source).as_posix(), digest=digest, size=size))
    return Input(source=str(source), files=tuple(entries))
