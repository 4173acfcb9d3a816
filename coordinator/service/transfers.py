"""Bytes on their way: read and written in threads, a chunk at a time, each file opened once.

A transfer that gets no further for STALL_S is ended, to be resumed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from blake3 import blake3

from offsite.coordinator.service.limits import check_request
from offsite.coordinator.service.uploads import Upload
from offsite.protos.chunks import CHUNK_BYTES, STALL_S
from offsite.protos.errors import InputError, UnreachableError
from offsite.protos.fleet_pb2 import UploadPart
from offsite.protos.transfer_pb2 import Chunk, DownloadRequest

HASH_BYTES = 32  # of the digest of a piece that a caller holds
PART_BYTES = CHUNK_BYTES + 64  # of an upload's message with a chunk

P = ParamSpec("P")
T = TypeVar("T")

_bytes = ThreadPoolExecutor(max_workers=4, thread_name_prefix="transfer")
_checks = ThreadPoolExecutor(max_workers=2, thread_name_prefix="check")  # seconds each, of a large update


async def _apart(pool: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make a call in a thread; one that is cancelled meanwhile waits for it, so that no file is closed under it."""
    work = asyncio.get_running_loop().run_in_executor(pool, lambda: call(*args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


async def send(path: Path, request: DownloadRequest, context: Any, recheck: Callable[[], None]) -> None:
    """Send a file from an offset on; `recheck` is asked before each chunk whether the caller may still have it."""
    if request.offset > path.stat().st_size:
        raise InputError(f"offset {request.offset} is beyond the end of the file; start again")
    if len(request.held) % HASH_BYTES:
        raise InputError(f"held: {len(request.held)} bytes are no digests of {HASH_BYTES} bytes each")
    pieces = (request.held[at : at + HASH_BYTES] for at in range(0, len(request.held), HASH_BYTES))
    held = {piece: number for number, piece in enumerate(pieces)}
    with path.open("rb", buffering=0) as file:
        file.seek(request.offset)
        while chunk := await _apart(_bytes, _next, file, held):
            recheck()
            try:
                async with asyncio.timeout(STALL_S):
                    await context.write(chunk)
            except TimeoutError:
                where = f"resume at byte {chunk.offset}"
                raise UnreachableError(f"nothing was read for {STALL_S:.0f} s; {where}") from None


def _next(file: FileIO, held: Mapping[bytes, int]) -> Chunk | None:
    """Read the next chunk, or name it if the caller holds it; None at the end."""
    offset, data = file.tell(), file.read(CHUNK_BYTES)
    if not data:
        return None
    number = held.get(blake3(data).digest()) if held else None
    return Chunk(offset=offset, data=data) if number is None else Chunk(offset=offset, held=number)


async def parts(stream: AsyncIterator[UploadPart], recheck: Callable[[], None]) -> AsyncIterator[UploadPart]:
    """Yield the parts of an upload, each within its bounds, of a caller who may still send them."""
    incoming = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                part = await anext(incoming, None)
        except TimeoutError:
            raise UnreachableError(f"upload: nothing came for {STALL_S:.0f} s; resume") from None
        recheck()
        if part is None:
            return
        if part.HasField("header"):
            check_request(part)
        elif part.ByteSize() > PART_BYTES:
            raise InputError(f"chunk: {part.ByteSize()} bytes came, at most {PART_BYTES} are taken")
        yield part


async def receive(upload: Upload, stream: AsyncIterator[UploadPart]) -> AsyncIterator[int]:
    """Write the chunks of an upload and accept it; yields the bytes that are kept, first of all and whenever it grows.

    One chunk is written while the next one comes.
    """
    kept = asyncio.create_task(_apart(_bytes, upload.begin))
    try:
        yield await kept
        async for part in stream:
            yield await kept
            kept = asyncio.create_task(_apart(_bytes, upload.write, part.chunk.offset, part.chunk.data))
        size = await kept
        accepted = asyncio.create_task(_apart(_checks, upload.finish))
        while not (await asyncio.wait([accepted], timeout=STALL_S / 4))[0]:
            yield size
        await accepted
    finally:
        await asyncio.wait([kept])
        upload.close()
