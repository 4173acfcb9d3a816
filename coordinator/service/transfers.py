"""Bytes on their way: read and written in threads, a piece at a time, each file opened once.

A transfer that gets no further for STALL_S is ended, to be resumed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

import grpc
from blake3 import blake3

from offsite.coordinator.service.limits import check_request
from offsite.coordinator.service.uploads import Upload
from offsite.coordinator.store.blobs import Blobs
from offsite.protos.chunks import CHUNK_BYTES, STALL_S, WINDOW_BYTES, algorithm_of, hasher
from offsite.protos.errors import InputError, UnreachableError
from offsite.protos.fleet_pb2 import UploadHeader
from offsite.protos.frames import Piece
from offsite.protos.transfer_pb2 import DownloadRequest

HASH_BYTES = 32  # of the digest of a piece that a caller holds
TOLD_BYTES = WINDOW_BYTES // 4  # an upload's sender is told what is kept when it is so much more

P = ParamSpec("P")
T = TypeVar("T")

_bytes = ThreadPoolExecutor(max_workers=4, thread_name_prefix="transfer")
_checks = ThreadPoolExecutor(max_workers=2, thread_name_prefix="check")  # seconds each, of a large update


def _apart(pool: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[T]":
    """Make a call in a thread, to be awaited within a shield: until it is over, no file may be closed under it."""
    there = partial(copy_context().run, call, *args, **kwargs)  # with what is logged of it
    return asyncio.get_running_loop().run_in_executor(pool, there)


class Source:
    """A blob on its way out, from an offset on; one that is sent whole is checked as it is read.

    A piece that the caller holds is named. The last piece of a blob whose bytes have changed is not given.
    """

    def __init__(self, blobs: Blobs, request: DownloadRequest) -> None:
        if len(request.held) % HASH_BYTES:
            raise InputError(f"held: {len(request.held)} bytes are no digests of {HASH_BYTES} bytes each")
        pieces = (request.held[at : at + HASH_BYTES] for at in range(0, len(request.held), HASH_BYTES))
        self._held = {piece: number for number, piece in enumerate(pieces)}
        path, self._judge = (blobs.served(request.digest), None) if request.offset else blobs.passed(request.digest)
        self._algorithm, self._at, self._size = algorithm_of(request.digest), request.offset, path.stat().st_size
        self._whole = hasher(self._algorithm)
        if request.offset > self._size:
            raise InputError(f"offset {request.offset} is beyond the end of the file; start again")
        self._file = path.open("rb", buffering=0)
        self._file.seek(request.offset)

    def next(self) -> Piece | None:
        """Read the next piece; None at the end. Raises MismatchError."""
        offset, data = self._at, self._file.read(CHUNK_BYTES)
        if not data:
            return None
        self._at += len(data)
        if self._judge:
            self._whole.update(data)
            if self._at >= self._size:
                self._judge(f"{self._algorithm}:{self._whole.hexdigest()}")
        number = self._held.get(blake3(data).digest()) if self._held else None
        return Piece(offset, data) if number is None else Piece(offset, held=number)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


async def send(
    blobs: Blobs,
    request: DownloadRequest,
    context: Any,
    recheck: Callable[[bool], None],
    count: Callable[[int], None] = lambda size: None,
) -> None:
    """Send a blob from an offset on; `recheck` is called before each piece and raises once the caller may not have it.

    One piece is read while the last one is sent.
    """
    source = await asyncio.to_thread(Source, blobs, request)
    coming = _apart(_bytes, source.next)
    try:
        while piece := await asyncio.shield(coming):
            coming = _apart(_bytes, source.next)
            recheck(False)
            try:
                async with asyncio.timeout(STALL_S):
                    await context.write(piece)
                count(len(piece.data))
            except TimeoutError:
                where = f"resume at byte {piece.offset}"
                raise UnreachableError(f"nothing was read for {STALL_S:.0f} s; {where}") from None
            except grpc.aio.InternalError:  # gRPC's word for a caller that has just gone, and that it has not noticed
                raise asyncio.CancelledError from None
    finally:
        await asyncio.gather(coming, return_exceptions=True)
        source.close()


async def parts(
    stream: AsyncIterator[Piece | UploadHeader], recheck: Callable[[bool], None]
) -> AsyncIterator[Piece | UploadHeader]:
    """Yield the parts of an upload, each within its bounds, of a caller who may still send them.

    `recheck` is called with each, and with True at their end: what comes of them is accepted after that.
    """
    incoming = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                part = await anext(incoming, None)
        except TimeoutError:
            raise UnreachableError(f"upload: nothing came for {STALL_S:.0f} s; resume") from None
        recheck(part is None)
        if part is None:
            return
        if isinstance(part, UploadHeader):
            check_request(part)
        elif len(part.data) > CHUNK_BYTES:
            raise InputError(f"chunk: {len(part.data)} bytes came, at most {CHUNK_BYTES} are taken")
        yield part


async def receive(
    upload: Upload, stream: AsyncIterator[Piece | UploadHeader], count: Callable[[int], None] = lambda size: None
) -> AsyncIterator[int]:
    """Write the pieces of an upload and accept it; yields the bytes that are kept, first of all and as they grow.

    One piece is written while the next one comes.
    """
    work: asyncio.Future[Any] = _apart(_bytes, upload.begin)
    try:
        yield (last := await asyncio.shield(work))
        async for part in stream:
            if isinstance(part, UploadHeader):
                raise InputError("upload: a second header came; the header is the first part only")
            if (size := await asyncio.shield(work)) - last >= TOLD_BYTES:
                yield (last := size)
            count(len(part.data))
            work = _apart(_bytes, upload.write, part.offset, part.data)
        size = await asyncio.shield(work)
        work = _apart(_checks, upload.finish)
        while not (await asyncio.wait([work], timeout=STALL_S / 4))[0]:
            yield size
        await work
    finally:
        await asyncio.gather(work, return_exceptions=True)
        await asyncio.shield(_apart(_bytes, upload.close))  # it may wait for the disk
