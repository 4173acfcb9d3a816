"""Files on their way out of the coordinator and into it: what is sent, what is only named, and when it is given up."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from offsite.coordinator.service import transfers
from offsite.protos.chunks import CHUNK_BYTES
from offsite.protos.errors import IdentityError, InputError, UnreachableError
from offsite.protos.fleet_pb2 import UploadHeader, UploadPart
from offsite.protos.transfer_pb2 import Chunk, DownloadRequest

PIECES = [bytes([number]) * CHUNK_BYTES for number in range(3)] + [b"end"]


class Reader:
    """The other end of a download; one that is `stuck` takes nothing."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.chunks, self.stuck = list[Chunk](), stuck

    async def write(self, chunk: Chunk) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        self.chunks.append(chunk)


def sent(path: Path, request: DownloadRequest, reader: Reader | None = None) -> list[Chunk]:
    reader = reader or Reader()
    asyncio.run(transfers.send(path, request, reader, lambda: None))
    return reader.chunks


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"".join(PIECES))
    return tmp_path / "file"


def test_pieces_that_the_caller_holds_are_named_and_the_others_sent(file: Path) -> None:
    whole = sent(file, DownloadRequest())
    assert [chunk.data for chunk in whole] == PIECES and [chunk.offset for chunk in whole][-1] == 3 * CHUNK_BYTES
    held = b"".join(blake3(piece).digest() for piece in (b"other", PIECES[3], PIECES[1]))
    chunks = sent(file, DownloadRequest(offset=CHUNK_BYTES, held=held))
    assert [(chunk.held if chunk.HasField("held") else None, chunk.data) for chunk in chunks] == [
        *((2, b""), (None, PIECES[2]), (1, b"")),
    ]


def test_a_file_beyond_four_gigabytes_is_sent_from_near_its_end(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as handle:
        handle.truncate(5 << 30)
        handle.seek((5 << 30) - 3)
        handle.write(b"end")
    (chunk,) = sent(tmp_path / "sparse", DownloadRequest(offset=(5 << 30) - 10))
    assert chunk.offset == (5 << 30) - 10 and chunk.data == bytes(7) + b"end"


def test_what_no_file_and_no_digest_has_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="offset 3145732 is beyond the end"):
        sent(file, DownloadRequest(offset=3 * CHUNK_BYTES + 4))
    with pytest.raises(InputError, match="held: 33 bytes are no digests"):
        sent(file, DownloadRequest(held=bytes(33)))


def test_a_transfer_that_gets_no_further_is_given_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "STALL_S", 0.01)
    with pytest.raises(UnreachableError, match="nothing was read for 0 s; resume at byte 1048576"):
        sent(file, DownloadRequest(offset=CHUNK_BYTES), Reader(stuck=True))

    async def silence() -> AsyncIterator[UploadPart]:
        yield UploadPart(header=UploadHeader(digest="x"))
        await asyncio.Event().wait()

    with pytest.raises(UnreachableError, match="nothing came for 0 s; resume"):
        asyncio.run(taken(silence()))


async def taken(stream: AsyncIterator[UploadPart], recheck: Any = lambda: None) -> list[UploadPart]:
    return [part async for part in transfers.parts(stream, recheck)]


def test_a_part_is_within_its_bounds_and_of_a_caller_who_may_still_send_it() -> None:
    async def one(part: UploadPart) -> AsyncIterator[UploadPart]:
        yield part

    most = UploadPart(chunk=Chunk(offset=2**64 - 1, data=PIECES[0]))
    assert asyncio.run(taken(one(most))) == [most]
    with pytest.raises(InputError, match="chunk: 1048669 bytes came"):
        asyncio.run(taken(one(UploadPart(chunk=Chunk(offset=1, data=PIECES[0] + bytes(83))))))

    def revoked() -> None:
        raise IdentityError("revoked")

    with pytest.raises(IdentityError):
        asyncio.run(taken(one(most), revoked))
