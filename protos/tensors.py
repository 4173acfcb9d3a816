"""Named tensors as safetensors files: the only form in which tensors cross a border."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offsite.kernels.schema import INTEGERS, Field, Schema, TensorMap, Tensors, size_bytes
from offsite.protos.chunks import READ_BYTES, hasher, read_chunks
from offsite.protos.documents import plain
from offsite.protos.errors import MismatchError

PIECE_BYTES = 4 * READ_BYTES  # of a tensor in memory at a time; with smaller ones threads wait for each other more
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
Source: TypeAlias = "Reader | Held"  # named tensors that are read a piece at a time: of a file, or of this process
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALONE = 1 << 14  # values that torch works on in the thread that asks; on a busy machine others cost more than they do


class Entry(NamedTuple):
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
def writing(
    path: Path, schema: Schema, *, metadata: Mapping[str, str] | None = None, digest: Path | None = None
) -> Iterator[Callable[[Tensors], None]]:
    """Write the tensors of a settled schema as they come, in any order; the file is whole and on disk, or not there.

    Its bytes depend on no order, and are those of `save` where all tensors have one dtype. The file `digest` is given
    its digest, before it is there itself; what comes in the order of the file is not read again for that. Raises
    ValueError for a tensor that is not of the schema or comes twice, and at the end if one is missing.
    """
    head, begins = _head(schema, metadata or {})
    partial = path.with_name(path.name + ".partial")
    missing, whole, seen = set(schema), hasher(), len(head)
    with partial.open("wb") as file:

        def write(tensors: Tensors) -> None:
            nonlocal seen
            for name, tensor in tensors.items():
                field = schema.get(name)
                if field is None or (tensor.dtype, tuple(tensor.shape)) != (DTYPES[field.dtype], field.shape):
                    raise ValueError(f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, agreed was {field}")
                if name not in missing:
                    raise ValueError(f"tensor {name} was written before")
                data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
                file.seek(len(head) + begins[name])
                file.write(data)
                if digest and seen == file.tell() - len(data):
                    whole.update(data)
                    seen += len(data)
                missing.remove(name)

        file.write(head)
        whole.update(head)
        file.truncate(len(head) + size_bytes(schema))
        yield write
        if missing:
            raise ValueError(f"{path.name}: tensor {min(missing)} is missing ({len(missing)} of {len(schema)} are)")
        file.flush()
        os.fsync(file.fileno())
    if digest:
        for _, data in read_chunks(partial, offset=seen):
            whole.update(data)
        _keep(digest, f"blake3:{whole.hexdigest()}")
    partial.replace(path)


def _keep(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _head(schema: Schema, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return how a safetensors file begins, and where after that each tensor does: large values first, so aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    for name, field in sorted(schema.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0])):
        begins[name], end = end, end + field.size_bytes
        entries[name] = {"dtype": field.dtype, "shape": field.shape, "data_offsets": [begins[name], end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


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
    """Read what a file says it holds, in its order, without its tensors.

    Raises MismatchError when it is not a safetensors file.
    """
    with _opened(path) as file:
        return _entries(file)


def _entries(file: Any) -> dict[str, Entry]:
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    return {name: Entry(dtype=piece.get_dtype(), shape=tuple(piece.get_shape())) for name, piece in slices.items()}


def check(path: Path, schema: Schema, *, fixed: Mapping[str, torch.Tensor] | None = None, what: str) -> None:
    """Check that a file holds exactly the tensors of a settled schema; raises MismatchError on the first fault.

    Floats are finite, integers within their bounds, and the tensors that `fixed` names are those. The header is judged
    before any tensor is read, and of the tensors a piece at a time is in memory.
    """
    check_header(path, schema, what=what)
    with reading(path) as file:
        check_values(file, schema, fixed=fixed, what=what)


def check_values(source: Source, schema: Schema, *, fixed: Mapping[str, torch.Tensor] | None = None, what: str) -> None:
    """Check the values of tensors that are of a schema; raises MismatchError as `check` does."""
    for name, field in schema.items():
        if field.bits is not None:
            _check_bits(source, name, field.bits, what=what)
        elif bad := sum(_strange(piece, field) for piece in source.pieces(name)):
            allowed = "finite" if field.below is None else f"in 0..{field.below - 1}"
            raise MismatchError(f"{what}: tensor {name} holds {bad} values that are not {allowed}")
    for name, tensor in (fixed or {}).items():
        flat = iter(torch.split(tensor.flatten(), ALONE))
        if not all(torch.equal(piece, next(flat)) for piece in source.pieces(name)):
            raise MismatchError(f"{what}: tensor {name} is not the one that all sites have, and does not train")


def _check_bits(source: Source, name: str, bits: int, *, what: str) -> None:
    """Check that the bits of a last byte that count for nothing are zero, so that equal bits are equal bytes."""
    last = [int(piece[-1]) for piece in source.pieces(name) if len(piece)][-1:]
    if bits % 8 and last and last[0] >> bits % 8:
        raise MismatchError(f"{what}: tensor {name} has bits beyond its {bits} that are not zero")


def _strange(piece: torch.Tensor, field: Field) -> int:
    """Count the values that no tensor of a field has."""
    if field.dtype in INTEGERS:
        return int(((piece < 0) | (piece >= (field.below or 0))).sum())
    return 0 if math.isfinite(norm(piece)) else int((~torch.isfinite(piece)).sum())


def check_header(path: Path, schema: Schema, *, what: str) -> None:
    """Check that a file says it holds exactly the tensors of a schema; raises MismatchError on the first fault."""
    check_entries(header(path), schema, what=what)


def check_entries(entries: Mapping[str, Entry], schema: Schema, *, what: str) -> None:
    """Check that what there is are exactly the tensors of a schema; raises MismatchError on the first fault."""
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
    with reading(path) as file, reading(start) as other:
        return gap(file, other)


def gap(source: Source, start: Source, names: Iterable[str] | None = None) -> float:
    """Return the same distance, whatever the tensors are read from, or that of some of them."""
    squares = (
        norm(piece - beside) ** 2
        for name in sorted(source if names is None else names)
        for piece, beside in zip(source.pieces(name), start.pieces(name), strict=True)
    )
    return math.sqrt(sum(squares))


def flips(source: Source, start: Source, name: str) -> int:
    """Count the bits in which two tensors of packed bits differ."""
    pairs = zip(source.pieces(name), start.pieces(name), strict=True)
    return sum(int(np.bitwise_count(piece.numpy() ^ beside.numpy()).sum()) for piece, beside in pairs)


def gaps(columns: TensorMap, start: TensorMap) -> list[float]:
    """Return the same distance of n at once, each tensor of which is (n, *shape); that of one depends on no other."""
    count = len(next(iter(columns.values())))
    squares = torch.zeros(count, dtype=torch.float64)
    for name in sorted(columns):
        flat = columns[name].reshape(count, start[name].numel()), start[name].flatten()
        for rows, beside in zip(*(torch.split(one, ALONE, dim=-1) for one in flat), strict=True):
            squares += (rows - beside).double().square_().sum(1)
    return [math.sqrt(square) for square in squares.tolist()]


def norm(piece: torch.Tensor) -> float:
    """L2 norm, summed in double precision without a copy in it."""
    piece = piece if piece.is_floating_point() else piece.double()  # of integers there is no norm
    return float(torch.linalg.vector_norm(piece, dtype=torch.float64))


class Held(dict[str, torch.Tensor]):
    """Tensors of this process, on the CPU, read as those of a file are; they do not change once they are read."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What there is."""
        return {name: Entry(_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self.items()}

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor as flat pieces, cut as those of a file are."""
        tensor = self[name].flatten()
        yield from (tensor,) if len(tensor) <= ALONE else torch.split(tensor, ALONE)


class Reader(Mapping[str, torch.Tensor]):
    """The tensors of an open file by name, each read when it is asked for.

    A mapped file would do without the copy, but all that was touched of it would count as resident memory.
    """

    def __init__(self, path: Path, file: Any, handle: Any) -> None:
        """Take the file as safetensors opened it, and a handle without a buffer."""
        self._path, self._handle = path, handle
        self.entries = _entries(file)
        # Without their values: to map each tensor reads a page of it, and that waits for all that is being written.
        self._like = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            if entry.dtype in DTYPES
            else file.get_tensor(name)
            for name, entry in self.entries.items()
        }
        # A safetensors file is its header and then its tensors without a gap, which opening it has checked.
        ends = list(itertools.accumulate(tensor.nbytes for tensor in self._like.values()))
        begin = path.stat().st_size - (ends[-1] if ends else 0)
        self._starts = dict(zip(self._like, (begin + end for end in (0, *ends)), strict=False))
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor as flat pieces, each of which holds until the next of the file is read."""
        for block in self.blocks(name):
            yield from torch.split(block, ALONE)

    def blocks(self, name: str, buffer: memoryview | None = None) -> Iterator[torch.Tensor]:
        """Yield the same as pieces of PIECE_BYTES and a last one, which may be written over.

        They are in a buffer of as many bytes: this one, or the reader's own.
        """
        at, dtype = self._starts[name], self._like[name].dtype
        end, buffer = at + self._like[name].nbytes, self._buffer if buffer is None else buffer
        for begin in range(at, end, len(buffer)):
            block = buffer[: end - begin]
            self._fill(block, begin)
            yield torch.frombuffer(block, dtype=dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor whole."""
        tensor = torch.empty_like(self._like[name], device="cpu")
        self._fill(tensor.view(-1).view(torch.uint8).numpy().data, self._starts[name])
        return tensor

    def _fill(self, buffer: memoryview, at: int) -> None:
        while buffer:
            size = os.preadv(self._handle.fileno(), [buffer], at)
            if not size:
                raise MismatchError(f"{self._path.name}: the file has become shorter while it was read")
            buffer, at = buffer[size:], at + size

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open a file to read some of it at a time; raises MismatchError when it is not a safetensors file."""
    with _opened(path) as file, path.open("rb", buffering=0) as handle:
        yield Reader(path, file, handle)
