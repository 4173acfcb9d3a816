"""How far an update is from its broadcast, summed up as its bytes come, so that it need not be read again for it."""

import itertools
import math
import os
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from offsite.kernels.schema import FLOATS, INTEGERS
from offsite.protos import tensors

NUMPY = {"F32": np.float32, "F64": np.float64}
ROW = 1024  # values that are summed up in their own precision: what that loses is lost of so few


class _Piece(NamedTuple):
    """A tensor of the update that is still to come."""

    end: int  # in the update, after its header
    dtype: str
    shift: int  # from there to the same tensor in the broadcast's file


class Change:
    """The L2 norm of the change since a broadcast, over all tensors of an update together.

    Of an update of floats that is laid out as the broadcast is, or as some tensors of it are, and comes in pieces that
    split no value. It takes the memory of two pieces. Nothing that the update says of itself is believed before `norm`
    is asked.
    """

    def __init__(self, broadcast: Path, names: Container[str] | None = None) -> None:
        """Take the broadcast, and which of its tensors the update has; None: all of them."""
        self._start = broadcast.open("rb", buffering=0)
        whole = tensors.header(broadcast)
        self._entries = {name: entry for name, entry in whole.items() if names is None or name in names}
        bytes_of = {**FLOATS, **INTEGERS}
        sizes = {name: math.prod(entry.shape) * bytes_of.get(entry.dtype, 0) for name, entry in whole.items()}
        begin = os.fstat(self._start.fileno()).st_size - sum(sizes.values())
        begins = dict(zip(whole, itertools.accumulate(sizes.values(), initial=begin), strict=False))
        ends = itertools.accumulate(sizes[name] for name in self._entries)
        self._left = [  # the next one is the last
            _Piece(end, entry.dtype, begins[name] + sizes[name] - end)
            for end, (name, entry) in zip(ends, self._entries.items(), strict=True)
        ][::-1]
        self._at: int | None = None  # how many bytes of tensors have come; None before the header
        self._squares = 0.0
        self._odd = any(not sizes[name] or entry.dtype not in FLOATS for name, entry in self._entries.items())
        self._part, self._beside = (memoryview(bytearray(tensors.PIECE_BYTES)) for _ in range(2))

    def norm(self, update: Path) -> float | None:
        """Return the norm for the file that has come, not finite where a tensor is not; None if it is to be read."""
        alike = list(tensors.header(update).items()) == list(self._entries.items())
        return math.sqrt(self._squares) if alike and not self._odd and not self._left else None

    def add(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the update's file; its header is whole in the first."""
        rest = memoryview(data)
        if self._at is None:
            self._at, rest = 0, rest[8 + int.from_bytes(rest[:8], "little") :]
        while rest and not self._odd:
            rest = rest[self._add(rest) :]

    def _add(self, data: memoryview) -> int:
        """Add what there is of the tensor that comes next; return how many bytes of the data that is."""
        assert self._at is not None, "the header has come"
        piece = self._left[-1] if self._left else None
        size = min(len(data), piece.end - self._at, len(self._part)) if piece else 0
        if piece is None or size % FLOATS[piece.dtype]:
            self._odd = True
            return len(data)
        part, beside = self._part[:size], self._beside[:size]
        part[:] = data[:size]  # where its values are aligned, and can be written over
        os.preadv(self._start.fileno(), [beside], piece.shift + self._at)
        self._squares += _squares(part, beside, piece.dtype)
        self._at += size
        if self._at == piece.end:
            self._left.pop()
        return size

    def close(self) -> None:
        """Close the broadcast."""
        self._start.close()


def _squares(here: memoryview, there: memoryview, dtype: str) -> float:
    """Return the sum of the squares of the differences, and write over what is here.

    NumPy does in a few calls what takes torch fifty, as pieces must be small for it not to use other threads; and at
    each call threads of Python wait for each other. It has no bfloat16.
    """
    if dtype in NUMPY:
        change = np.frombuffer(here, NUMPY[dtype])
        with np.errstate(all="ignore"):  # what is not finite shows in the sum
            np.subtract(change, np.frombuffer(there, NUMPY[dtype]), out=change)
            whole = len(change) // ROW * ROW
            rows, rest = change[:whole].reshape(-1, ROW), change[whole:]
            return float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(np.vecdot(rest, rest))
    pieces, starts = (
        torch.split(torch.frombuffer(one, dtype=tensors.DTYPES[dtype]), tensors.ALONE) for one in (here, there)
    )
    return sum(tensors.norm(piece - start) ** 2 for piece, start in zip(pieces, starts, strict=True))
