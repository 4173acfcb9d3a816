"""Bytes on their way: a transfer whose other end takes or gives nothing for a while is ended, to be resumed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from offsite.coordinator.service.limits import STALL_S, check_request
from offsite.protos.chunks import read_chunks
from offsite.protos.errors import InputError, UnreachableError
from offsite.protos.fleet_pb2 import UploadPart
from offsite.protos.transfer_pb2 import Chunk

PIECE_BYTES = 1 << 18  # sent at once: gRPC holds several of them for a reader that stalls


async def send(path: Path, offset: int, context: Any, recheck: Callable[[], None]) -> None:
    """Send a file from an offset on; `recheck` is asked before each chunk whether the caller may still have it."""
    if offset > path.stat().st_size:
        raise InputError(f"offset {offset} is beyond the end of the file; start again")
    for at, data in read_chunks(path, offset=offset, size=PIECE_BYTES):
        recheck()
        try:
            async with asyncio.timeout(STALL_S):
                await context.write(Chunk(offset=at, data=data))
        except TimeoutError:
            raise UnreachableError(f"nothing was read for {STALL_S:.0f} s; resume at byte {at}") from None


async def parts(stream: AsyncIterator[UploadPart]) -> AsyncIterator[UploadPart]:
    """Yield the parts of an upload, each within its bounds."""
    incoming = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                part = await anext(incoming, None)
        except TimeoutError:
            raise UnreachableError(f"upload: nothing came for {STALL_S:.0f} s; resume") from None
        if part is None:
            return
        check_request(part)
        yield part
