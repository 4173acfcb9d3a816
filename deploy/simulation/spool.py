"""Packed updates that wait for the end of their round: on disk, so that memory does not grow with the sites.

Live ones wait in files of their own that outlive a power cut. These have one file for each worker, and no header, for
all updates of a tier are alike. Those that one order asked for lie together, each tensor of all of them one after the
other, so that a few calls write them, and whoever folds some of the tensors reads no others. A round writes over the
last one, whose pages the system has at hand: new ones take it ten times as long. A round that was killed is done again.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from offsite.kernels.schema import Schema, TensorMap, Tensors, size_bytes
from offsite.protos import tensors

VECTORS = 512  # of one call, at most 1024


class Layout:
    """Where the tensors of a settled schema are in a stretch of bytes: large values first, so that all are aligned."""

    def __init__(self, schema: Schema) -> None:
        """Lay them out."""
        self.size = size_bytes(schema)  # of one update
        self._fields: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        end = 0
        for name, field in sorted(schema.items(), key=lambda item: (-tensors.DTYPES[item[1].dtype].itemsize, item[0])):
            shape = tuple(size for size in field.shape if size is not None)
            begin, end = end, end + field.size_bytes
            self._fields[name] = tensors.DTYPES[field.dtype], shape, begin, end

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def place(self, name: str, rows: int) -> tuple[int, int]:
        """Return where a tensor of so many updates begins and ends."""
        _, _, begin, end = self._fields[name]
        return begin * rows, end * rows

    def view(self, name: str, memory: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the bytes of a tensor of so many updates as what they are, (rows, *shape)."""
        dtype, shape, _, _ = self._fields[name]
        return memory.view(dtype).view(rows, *shape)


class Block:
    """Memory for updates of one layout that will lie together, used again and again; its first `count` rows are one."""

    def __init__(self, layout: Layout, rows: int) -> None:
        """Make room for so many."""
        self._layout, self._rows, self.count = layout, rows, 0
        memory = torch.empty(rows * layout.size, dtype=torch.uint8)
        self._bytes = memory.numpy().data
        self._columns = {name: layout.view(name, memory[slice(*layout.place(name, rows))], rows) for name in layout}
        parted = {name: tensor.unbind() for name, tensor in self._columns.items()}
        self.rows = [tensors.Held({name: parts[row] for name, parts in parted.items()}) for row in range(rows)]

    @property
    def columns(self) -> Tensors:
        """Each tensor of all updates that there are, (count, *shape)."""
        return {name: tensor[: self.count] for name, tensor in self._columns.items()}

    def add(self, update: TensorMap) -> None:
        """Take a copy of an update, whose tensors are those of the layout."""
        with torch.no_grad():
            for name, place in self.rows[self.count].items():
                place.copy_(update[name])
        self.count += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all updates but some, in ascending order."""
        for to, row in enumerate(rows):
            if to != row:
                for name, place in self.rows[to].items():
                    place.copy_(self.rows[row][name])
        self.count = len(rows)

    def write(self, file: int, offset: int) -> int:
        """Write what there is to a place in a file; return how many bytes that is."""
        views = []
        for name in self._layout:
            begin, _ = self._layout.place(name, self._rows)
            size = len(range(*self._layout.place(name, self.count)))
            views.append(self._bytes[begin : begin + size])
        views = [self._bytes] if self.count == self._rows else [view for view in views if view]
        return write(file, views, offset)


class Stretch:
    """Updates that lie together in a file; each tensor of all of them is read when it is first asked for."""

    def __init__(self, file: int, offset: int, layout: Layout, rows: int) -> None:
        """Take how many there are, and where they begin."""
        self._file, self._offset, self._layout, self._count = file, offset, layout, rows
        self._parted: dict[str, Sequence[torch.Tensor]] = {}

    def row(self, number: int) -> TensorMap:
        """Return one of the updates."""
        return _Row(self, number)

    def parted(self, name: str) -> Sequence[torch.Tensor]:
        """Return a tensor of each update."""
        if name not in self._parted:
            begin, end = self._layout.place(name, self._count)
            memory = read(self._file, end - begin, self._offset + begin)
            self._parted[name] = self._layout.view(name, memory, self._count).unbind()
        return self._parted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)


class _Row(Mapping[str, torch.Tensor]):
    def __init__(self, stretch: Stretch, number: int) -> None:
        self._stretch, self._number = stretch, number

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stretch.parted(name)[self._number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stretch)

    def __len__(self) -> int:
        return len([*self._stretch])


class Spool:
    """The files of one round's updates, one for each worker; any worker may read them, once they are there."""

    def __init__(self, folder: Path) -> None:
        """Name the folder that they are in."""
        self._folder = folder
        self._files: dict[int, int] = {}

    def clear(self) -> None:
        """Make the folder, with none of them in it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._folder.glob("*.spool"):
            path.unlink()

    def open(self, worker: int) -> int:
        """Open the file of a worker to write it, and to read it."""
        return os.open(self._path(worker), os.O_RDWR | os.O_CREAT, 0o600)

    def file(self, worker: int) -> int:
        """Return the file of a worker, open to read it."""
        if worker not in self._files:
            self._files[worker] = os.open(self._path(worker), os.O_RDONLY)
        return self._files[worker]

    def _path(self, worker: int) -> Path:
        return self._folder / f"worker-{worker}.spool"


def write(file: int, views: list[memoryview], offset: int) -> int:
    """Write stretches of bytes, one after the other, to a place in a file; return how many bytes that is."""
    end = offset
    while views:
        written = os.pwritev(file, views[:VECTORS], end)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        end += written
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]
    return end - offset


def read(file: int, size: int, offset: int) -> torch.Tensor:
    """Read so many bytes from a place in a file."""
    memory = torch.empty(size, dtype=torch.uint8)
    left = memory.numpy().data
    while left:
        count = os.preadv(file, [left], offset)
        if not count:
            raise OSError(errno.EIO, "the spool has become shorter while it was read")
        left, offset = left[count:], offset + count
    return memory
