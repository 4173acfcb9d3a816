"""Named tensors as safetensors files: the only form in which tensors cross a border."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offsite.kernels.schema import INTEGERS, Field, Schema, Tensors
from offsite.protos.documents import plain
from offsite.protos.errors import MismatchError

PIECE_BYTES = 1 << 20  # of a tensor in memory at a time where a file is read through: it fits a core's cache
ALONE = 1 << 14  # values that torch works on in the thread that asks; on a busy machine others cost more than they do


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


def load(path: Path, names: Iterable[str] | None = None) -> Tensors:
    """Read all tensors of a file, or those of some names; raises MismatchError when it is not a safetensors file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def about(path: Path) -> dict[str, str]:
    """Read the metadata of a file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def header(path: Path) -> dict[str, Entry]:
    """Read what a file says it holds, without its tensors; raises MismatchError when it is not a safetensors file."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: Entry(dtype=piece.get_dtype(), shape=tuple(piece.get_shape())) for name, piece in slices.items()}


def check(path: Path, schema: Schema, *, fixed: Mapping[str, torch.Tensor] | None = None, what: str) -> None:
    """Check that a file holds exactly the tensors of a settled schema; raises MismatchError on the first fault.

    Floats are finite, integers within their bounds, and the tensors that `fixed` names are those. The header is judged
    before any tensor is read, and of the tensors a piece at a time is in memory.
    """
    check_header(path, schema, what=what)
    with _values(path) as values:
        for name, field in schema.items():
            if bad := sum(_strange(piece, field) for piece in values(name)):
                allowed = "finite" if field.below is None else f"in 0..{field.below - 1}"
                raise MismatchError(f"{what}: tensor {name} holds {bad} values that are not {allowed}")
        for name, tensor in (fixed or {}).items():
            flat = iter(torch.split(tensor.flatten(), ALONE))
            if not all(torch.equal(piece, next(flat)) for piece in values(name)):
                raise MismatchError(f"{what}: tensor {name} is not the one that all sites have, and does not train")


def _strange(piece: torch.Tensor, field: Field) -> int:
    """Count the values that no tensor of a field has."""
    if field.dtype in INTEGERS:
        return int(((piece < 0) | (piece >= (field.below or 0))).sum())
    return 0 if math.isfinite(_norm(piece)) else int((~torch.isfinite(piece)).sum())


def check_header(path: Path, schema: Schema, *, what: str) -> None:
    """Check that a file says it holds exactly the tensors of a schema; raises MismatchError on the first fault."""
    entries = header(path)
    if missing := sorted(schema.keys() - entries.keys()):
        raise MismatchError(f"{what}: tensor {missing[0]} is missing ({len(missing)} of {len(schema)} are)")
    if extra := sorted(entries.keys() - schema.keys()):
        raise MismatchError(f"{what}: tensor {plain(extra[0], most=200)} was not asked for ({len(extra)} were not)")
    for name, field in schema.items():
        entry = entries[name]
        if (entry.dtype, entry.shape) != (field.dtype, field.shape):
            raise MismatchError(
                f"{what}: tensor {name} is {entry.dtype} {list(entry.shape)}, "
                f"expected {field.dtype} {list(field.shape)}"
            )


def distance(path: Path, start: Path) -> float:
    """L2 norm, over all tensors of a file together, of how far they are from those of the same names in another.

    Not finite where a tensor of either is not. A piece of each is in memory at a time.
    """
    with _values(path) as values, _values(start) as starts:
        squares = (
            _norm(piece - other) ** 2
            for name in sorted(header(path))
            for piece, other in zip(values(name), starts(name), strict=True)
        )
        return math.sqrt(sum(squares))


def _norm(piece: torch.Tensor) -> float:
    """L2 norm, summed in double precision without a copy in it."""
    piece = piece if piece.is_floating_point() else piece.double()  # of integers there is no norm
    return float(torch.linalg.vector_norm(piece, dtype=torch.float64))


@contextmanager
def _values(path: Path) -> Iterator[Callable[[str], Iterator[torch.Tensor]]]:
    """Open a file to read tensors by name as flat pieces, each of which holds until the next of the file is read.

    A mapped file would do without the copy, but all that was touched of it would count as resident memory.
    """
    with _opened(path) as file, path.open("rb", buffering=0) as handle:
        # A safetensors file is its header and then its tensors without a gap, which opening it has checked.
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}  # mapped: none is read by this
        ends = list(itertools.accumulate(tensor.nbytes for tensor in tensors.values()))
        begin = path.stat().st_size - (ends[-1] if ends else 0)
        starts = dict(zip(tensors, (begin + end for end in (0, *ends)), strict=False))
        buffer = memoryview(bytearray(PIECE_BYTES))

        def pieces(name: str) -> Iterator[torch.Tensor]:
            at, end = starts[name], starts[name] + tensors[name].nbytes
            while at < end:
                size = os.preadv(handle.fileno(), [buffer[: end - at]], at)
                if not size:
                    raise MismatchError(f"{path.name}: the file has become shorter while it was read")
                yield from torch.split(torch.frombuffer(buffer[:size], dtype=tensors[name].dtype), ALONE)
                at += size

        yield pieces
