"""Named tensors as safetensors files: the only form in which tensors cross a border."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offsite.protos.documents import plain
from offsite.protos.errors import MismatchError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of one tensor, as the header of a file states them."""

    dtype: str
    shape: tuple[int, ...]


def save(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors so that the file is either whole and on disk or not there."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, partial, metadata=dict(metadata or {}))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise MismatchError(f"{path.name}: not a safetensors file: {plain(str(error))}") from None


def load(path: Path) -> Tensors:
    """Read all tensors of a file; raises MismatchError when it is not a safetensors file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def about(path: Path) -> dict[str, str]:
    """Read the metadata of a file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def header(path: Path) -> dict[str, Entry]:
    """Read what a file says it holds, without its tensors; raises MismatchError when it is not a safetensors file."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: Entry(dtype=piece.get_dtype(), shape=tuple(piece.get_shape())) for name, piece in slices.items()}


def check(path: Path, expected: Mapping[str, Entry], *, what: str) -> Tensors:
    """Load a file that must hold exactly the expected tensors, all finite; raises MismatchError on the first fault.

    The header is judged before any tensor is read.
    """
    found = header(path)
    if missing := sorted(expected.keys() - found.keys()):
        raise MismatchError(f"{what}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    if extra := sorted(found.keys() - expected.keys()):
        raise MismatchError(f"{what}: tensor {plain(extra[0], most=200)} was not asked for ({len(extra)} were not)")
    for name, entry in expected.items():
        if found[name] != entry:
            got = found[name]
            raise MismatchError(
                f"{what}: tensor {name} is {got.dtype} {list(got.shape)}, expected {entry.dtype} {list(entry.shape)}"
            )
    tensors = load(path)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise MismatchError(f"{what}: tensor {name} holds {bad} values that are not finite")
    return tensors


def distance(tensors: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> float:
    """L2 norm, over all tensors together, of how far these are from those of the same names."""
    squares = (float((tensors[name] - start[name]).double().square().sum()) for name in sorted(tensors))
    return math.sqrt(sum(squares))
