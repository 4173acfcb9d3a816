"""Packed updates that wait for the end of their round: on disk, so that memory does not grow with the sites.

Live ones wait in files of their own that outlive a power cut. These have one file for each worker, and no header, for
all updates of a tier are alike. A round writes over the last one, whose pages the system has at hand: new ones take it
ten times as long. A round that was killed is done again.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from offsite.kernels.schema import Schema, TensorMap, Tensors, size_bytes
from offsite.protos import tensors, upload
from offsite.protos.upload import Stage

VECTORS = 512  # of one call, at most 1024


class Layout:
    """Where the tensors of a settled schema are in one stretch of bytes: large values first, so all are aligned."""

    def __init__(self, schema: Schema) -> None:
        """Lay them out."""
        self.schema, self.size = schema, size_bytes(schema)
        self._places: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
        end = 0
        for name, field in sorted(schema.items(), key=lambda item: (-tensors.DTYPES[item[1].dtype].itemsize, item[0])):
            shape = tuple(size for size in field.shape if size is not None)
            begin, end = end, end + field.size_bytes
            self._places.append((name, tensors.DTYPES[field.dtype], shape, begin, end))

    def write(self, file: int, offset: int, update: tensors.Held) -> None:
        """Write an update to a place in a file."""
        if update.flat is not None:  # of one dtype, so the order is that of the names
            _write(file, offset, [update.flat.view(torch.uint8).numpy().data])
            return
        for at in range(0, len(self._places), VECTORS):
            part = self._places[at : at + VECTORS]
            views = [update[name].detach().contiguous().flatten().view(torch.uint8).numpy().data for name, *_ in part]
            _write(file, offset + part[0][3], views)

    def read(self, file: int, offset: int) -> Tensors:
        """Read an update back, into memory of its own."""
        whole = torch.empty(self.size, dtype=torch.uint8)
        if os.preadv(file, [whole.numpy().data], offset) != self.size:
            raise OSError(errno.EIO, "the spool has become shorter while it was read")
        return {name: whole[begin:end].view(dtype).view(shape) for name, dtype, shape, begin, end in self._places}


def _write(file: int, offset: int, views: list[memoryview]) -> None:
    if os.pwritev(file, views, offset) != sum(len(view) for view in views):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Spool:
    """The updates of one round, as the process that folds them sees them."""

    def __init__(self, folder: Path, workers: int) -> None:
        """Name the files, one for each worker."""
        self.paths = [folder / f"worker-{number}.spool" for number in range(workers)]

    def clear(self) -> None:
        """Make the files, empty."""
        for path in self.paths:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(b"")

    @cached_property
    def _files(self) -> list[int]:
        return [os.open(path, os.O_RDONLY) for path in self.paths]

    @contextmanager
    def opened(
        self, worker: int, offset: int, layout: Layout, broadcast: TensorMap, schema: Schema, stages: Sequence[Stage]
    ) -> Iterator[TensorMap]:
        """Open an update as the adapter that it stands for."""
        yield upload.unpack(stages, layout.read(self._files[worker], offset), broadcast, schema)
