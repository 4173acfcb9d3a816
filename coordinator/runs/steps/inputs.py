"""What steps begin from: the base, the owner's texts, and what a step that was killed left behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.store.blobs import Blobs
from offsite.emulator import zoo
from offsite.emulator.modality import Sample, encode, read
from offsite.protos.chunks import digest_bytes, digest_file, hex_of
from offsite.protos.documents import to_json
from offsite.protos.errors import MismatchError
from offsite.protos.spec import FileEntry, RunSpec


@contextmanager
def at_desk(node: Node) -> Iterator[Node]:
    """Give a node a folder for the owner's files that a step reads; it ends with the step."""
    with TemporaryDirectory(dir=node.prepare().scratch) as desk:
        yield replace(node, desk=Path(desk))


def here(node: Node, spec: Grant, place: str) -> str:
    """Return where a model or a text of the run is on this machine.

    Of a run whose inputs were gathered, it is a folder of links, made when it is first asked for. A file that this
    machine has at the place it was gathered from, with the same bytes, is not fetched.
    """
    if place not in spec.inputs:
        return place
    target, given, blobs = Path(desks(node, spec)[place]), spec.inputs[place], node.blobs()
    if not target.exists():
        for entry in given.files:
            link = target / entry.path
            link.parent.mkdir(parents=True, exist_ok=True)
            _link(blobs, Path(given.source) / entry.path, entry, link)
        if not given.files:
            target.mkdir(parents=True)
    return str(target)


def desks(node: Node, spec: Grant) -> dict[str, str]:
    """Return where a node has, or will have, each place whose files were gathered; the last part of a path stays."""
    return {
        place: str(node.desk / str(number) / Path(given.source).name)
        for number, (place, given) in enumerate(sorted(spec.inputs.items()))
    }


def _link(blobs: Blobs, source: Path, entry: FileEntry, link: Path) -> None:
    """Link to a file where it was gathered, if that is still the same, else to its blob."""
    if source.is_file() and source.stat().st_size == entry.size and digest_file(source) == entry.digest:
        link.symlink_to(source.resolve())
    else:
        os.link(blobs.path(entry.digest), link)  # not symbolic: the cache may let go of it while the step reads


def the_base(node: Node, spec: Grant, digest: str) -> Path:
    """Find the base again; raises MismatchError if it is no longer what the run began with."""
    source = zoo.locate(here(node, spec, spec.model), cache=zoo.cache_folder())
    if not spec.inputs and (actual := zoo.digest(source)) != digest:
        raise MismatchError(f"model {spec.model} has changed since the run began: {actual}, it was {digest}")
    return source


def text(node: Node, spec: Grant, place: str) -> Path | None:
    """Return where a text of the run is on this machine; None if the run has none."""
    return Path(here(node, spec, place)) if place else None


def folders(spec: Grant) -> list[Path]:
    """Return the folders that links inside a folder of texts may not leave; none: they may lead anywhere.

    What was gathered was held against them then.
    """
    return [] if spec.inputs else [Path(folder) for folder in spec.folders]


def samples(node: Node, spec: Grant, place: str, tokenizer: Any) -> list[Sample]:
    """Read a text of the run, as long as its sequences may be; raises ValueError."""
    examples = read(Path(here(node, spec, place)), folders=folders(spec))
    return encode(examples, tokenizer, max_length=spec.training.max_length)


def unfinished(node: Node, spec: RunSpec, step: str) -> Path:
    """Where a long step keeps its state, so that it goes on after a kill: the same work finds the same folder.

    Each machine has its own: on another one the step begins anew.
    """
    return node.scratch / f"unfinished-{hex_of(digest_bytes(to_json(spec) + step.encode()), most=16)}"
