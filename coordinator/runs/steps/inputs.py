"""What steps begin from: the base, the folders of texts, and what a step that was killed left behind."""

from pathlib import Path
from typing import Any

from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.emulator import zoo
from offsite.emulator.modality import Sample, encode, read
from offsite.protos.chunks import digest_bytes, hex_of
from offsite.protos.documents import to_json
from offsite.protos.errors import MismatchError
from offsite.protos.spec import RunSpec


def the_base(spec: RunSpec, digest: str) -> Path:
    """Find the base again; raises MismatchError if it is no longer what the run began with."""
    source = zoo.locate(spec.model, cache=zoo.cache_folder())
    if (actual := zoo.digest(source)) != digest:
        raise MismatchError(f"model {spec.model} has changed since the run began: {actual}, it was {digest}")
    return source


def folders(spec: Grant) -> list[Path]:
    """Return the folders that links inside a folder of texts may not leave; none: they may lead anywhere."""
    return [Path(folder) for folder in spec.folders]


def samples(spec: Grant, text: str, tokenizer: Any) -> list[Sample]:
    """Read a text of the run, as long as its sequences may be; raises ValueError."""
    return encode(read(Path(text), folders=folders(spec)), tokenizer, max_length=spec.training.max_length)


def unfinished(node: Node, spec: RunSpec, step: str) -> Path:
    """Where a long step keeps its state, so that it goes on after a kill: the same work finds the same folder."""
    return node.scratch / f"unfinished-{hex_of(digest_bytes(to_json(spec) + step.encode()), most=16)}"
