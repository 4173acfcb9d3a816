"""Files on their way to and from this end: hashed as they pass, resumed where they broke off, a chunk at a time."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from offsite.protos.chunks import (
    CHUNK_BYTES,
    STALL_S,
    WINDOW_BYTES,
    algorithm_of,
    digest_bytes,
    hasher,
    hex_of,
    piece_digests,
    read_chunks,
)
from offsite.protos.errors import MismatchError, UnreachableError
from offsite.protos.fleet_pb2 import UploadHeader, UploadPart
from offsite.protos.frames import Piece
from offsite.protos.transfer_pb2 import DownloadRequest

MOST_HELD = 1 << 15  # pieces that one request names: a file of 32 GiB


class Incoming:
    """A download, from what an earlier one left to a whole file; a context manager.

    Not a byte more than `size` is written. Pieces of an `earlier` file that are the same are not sent again.
    """

    def __init__(
        self, path: Path, digest: str, *, size: int | None, earlier: Path | None, progress: Callable[[int], None]
    ) -> None:
        self.received = 0  # bytes, over the network
        self._path, self._digest, self._size, self._progress = path, digest, size, progress
        self._partial = path.with_name(f"{path.name}.{hex_of(digest, most=12)}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("ab")
        self._earlier = earlier if earlier is not None and earlier.is_file() else None
        self._held = piece_digests(self._earlier)[:MOST_HELD] if self._earlier else []
        if self._held:  # only from there on is a piece of one file one of the other
            self._file.truncate(self._file.tell() // CHUNK_BYTES * CHUNK_BYTES)
        self.at, self._whole = 0, hasher(algorithm_of(digest))
        for _, data in read_chunks(self._partial):
            self._whole.update(data)
            self.at += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is MismatchError:  # then nothing that came can be relied on
            self._partial.unlink()

    def take(self, method: Any) -> None:
        """Take what is missing from one stream."""
        request = DownloadRequest(digest=self._digest, offset=self.at, held=b"".join(self._held))
        for offset, data, held in method(request, stall_s=STALL_S):
            if held is not None:
                data = self._piece(held)
            if offset != self.at:
                raise MismatchError(f"{self._path.name}: chunk at byte {offset}, expected at {self.at}")
            if self._size is not None and self.at + len(data) > self._size:
                raise MismatchError(f"{self._path.name}: more than the {self._size} bytes that were announced")
            self._file.write(data)
            self._whole.update(data)
            self.at += len(data)
            received = len(data) if held is None else 0
            self.received += received
            self._progress(received)

    def _piece(self, number: int) -> bytes:
        """Read a piece of the earlier file; one that has changed since it was named is asked for after all."""
        if not number < len(self._held):
            raise MismatchError(f"{self._path.name}: piece {number} of {len(self._held)} that this end has")
        assert self._earlier is not None, "a piece is held"
        _, data = next(read_chunks(self._earlier, offset=number * CHUNK_BYTES), (0, b""))
        if bytes.fromhex(hex_of(digest_bytes(data))) != self._held[number]:
            self._held = []
            raise UnreachableError(f"{self._earlier}: has changed while {self._path.name} was made from it; resume")
        return data

    def finish(self) -> None:
        """Give the whole file its name; raises MismatchError unless it is what was asked for."""
        if (digest := f"{algorithm_of(self._digest)}:{self._whole.hexdigest()}") != self._digest:
            what = f"its digest is {digest}, expected {self._digest}; what came was thrown away"
            raise MismatchError(f"{self._path.name}: {what}")
        self._file.close()
        os.replace(self._partial, self._path)


class Outgoing:
    """An upload, which is at most WINDOW_BYTES ahead of what the coordinator says it keeps."""

    def __init__(self, path: Path, header: UploadHeader) -> None:
        self.kept = 0  # bytes, by the coordinator's last word
        self._path, self._header = path, header

    def give(self, method: Any) -> None:
        """Send what is missing over one stream; returns once the update is durable at the other end."""
        states: SimpleQueue[int | None] = SimpleQueue()
        accepted = False
        try:
            for state in method(self._parts(states), stall_s=STALL_S):
                accepted = bool(state.digest)
                self.kept = max(self.kept, state.kept)
                states.put(state.kept)
        finally:
            states.put(None)
        if not accepted:
            raise UnreachableError(f"{self._path.name}: the upload ended without a receipt; resume")

    def _parts(self, states: "SimpleQueue[int | None]") -> Iterator[UploadPart | Piece]:
        """Yield the parts; read by a thread of gRPC's, which would read ahead as far as it is let."""
        yield UploadPart(header=self._header)
        kept = states.get()
        for at, data in read_chunks(self._path, offset=kept or 0):
            while kept is not None and at + len(data) > kept + WINDOW_BYTES:
                kept = states.get()
            if kept is None:
                return
            yield Piece(at, data)
