"""Files on their way out of the coordinator and into it: what is sent, what is only named, and when it is given up."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from blake3 import blake3

from offsite.coordinator.service import transfers
from offsite.coordinator.store import blobs as store
from offsite.coordinator.store.blobs import Folder
from offsite.protos.chunks import CHUNK_BYTES, WINDOW_BYTES
from offsite.protos.errors import IdentityError, InputError, MismatchError, UnreachableError
from offsite.protos.fleet_pb2 import UploadHeader
from offsite.protos.frames import Piece
from offsite.protos.transfer_pb2 import DownloadRequest

Part = Piece | UploadHeader
PIECES = [bytes([number]) * CHUNK_BYTES for number in range(3)] + [b"end"]


class Reader:
    """The other end of a download; one that is `stuck` takes nothing."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.pieces, self.stuck = list[Piece](), stuck

    async def write(self, piece: Piece) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        self.pieces.append(piece)


@dataclass
class Blob:
    """A blob of three and a half pieces in a store, and what asks for it."""

    blobs: Folder
    digest: str

    def sent(self, reader: Any = None, **asked: Any) -> list[Piece]:
        reader = reader or Reader()
        request = DownloadRequest(digest=self.digest, **asked)
        asyncio.run(transfers.send(self.blobs, request, reader, lambda last: None))
        return reader.pieces


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    (tmp_path / "file").write_bytes(b"".join(PIECES))
    blobs = Folder(tmp_path / "blobs")
    return Blob(blobs, blobs.take(tmp_path / "file")[0])


def test_pieces_that_the_caller_holds_are_named_and_the_others_sent(blob: Blob) -> None:
    assert blob.sent() == [Piece(number * CHUNK_BYTES, data) for number, data in enumerate(PIECES)]
    held = b"".join(blake3(piece).digest() for piece in (b"other", PIECES[3], PIECES[1]))
    one, two, three = (number * CHUNK_BYTES for number in (1, 2, 3))
    assert blob.sent(offset=one, held=held) == [Piece(one, held=2), Piece(two, PIECES[2]), Piece(three, held=1)]


def test_a_blob_is_checked_as_it_is_first_sent_and_not_again(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, **_: Any) -> str:
        raise AssertionError(f"{path} is read for its digest alone")

    monkeypatch.setattr(store, "digest_file", read)
    with pytest.raises(AssertionError):
        blob.sent(offset=1)  # which tells nothing of what is before it
    blob.sent()
    assert len(blob.sent(offset=1)) == 4 and blob.blobs.served(blob.digest)


def test_of_a_blob_that_has_changed_the_last_piece_is_not_sent(blob: Blob) -> None:
    blob.blobs.served(blob.digest).write_bytes(b"".join(PIECES[:3]) + b"eve")
    for _ in range(2):
        reader = Reader()
        with pytest.raises(MismatchError, match="the file has changed since it was stored"):
            blob.sent(reader)
        assert [piece.data for piece in reader.pieces] == PIECES[:3]


def test_a_file_beyond_four_gigabytes_is_sent_from_near_its_end(blob: Blob) -> None:
    path, _ = blob.blobs.passed(blob.digest)
    blob.blobs.served(blob.digest)
    with path.open("wb") as handle:
        handle.truncate(5 << 30)
        handle.seek((5 << 30) - 3)
        handle.write(b"end")
    blob.blobs.served = lambda digest: path  # type: ignore[method-assign]  # it takes seconds to read it
    (piece,) = blob.sent(offset=(5 << 30) - 10)
    assert piece == Piece((5 << 30) - 10, bytes(7) + b"end")


def test_what_no_file_and_no_digest_has_is_refused(blob: Blob) -> None:
    with pytest.raises(InputError, match="offset 3145732 is beyond the end"):
        blob.sent(offset=3 * CHUNK_BYTES + 4)
    with pytest.raises(InputError, match="held: 33 bytes are no digests"):
        blob.sent(held=bytes(33))


def test_a_transfer_that_gets_no_further_is_given_up(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "STALL_S", 0.01)
    with pytest.raises(UnreachableError, match="nothing was read for 0 s; resume at byte 1048576"):
        blob.sent(Reader(stuck=True), offset=CHUNK_BYTES)

    async def silence() -> AsyncIterator[Part]:
        yield UploadHeader(digest="x")
        await asyncio.Event().wait()

    with pytest.raises(UnreachableError, match="nothing came for 0 s; resume"):
        asyncio.run(taken(silence()))


def test_a_caller_that_is_gone_ends_a_transfer_without_a_word(blob: Blob) -> None:
    class Gone:
        async def write(self, piece: Piece) -> None:
            raise grpc.aio.InternalError

    with pytest.raises(asyncio.CancelledError):
        blob.sent(Gone())


async def taken(stream: AsyncIterator[Part], recheck: Any = lambda last: None) -> list[Part]:
    return [part async for part in transfers.parts(stream, recheck)]


def test_a_part_is_within_its_bounds_and_of_a_caller_who_may_still_send_it() -> None:
    async def one(part: Part) -> AsyncIterator[Part]:
        yield part

    most = Piece(2**64 - 1, PIECES[0])
    assert asyncio.run(taken(one(most))) == [most]
    with pytest.raises(InputError, match="chunk: 1048577 bytes came"):
        asyncio.run(taken(one(Piece(1, PIECES[0] + b"x"))))
    with pytest.raises(InputError, match="digest: 129 characters came"):
        asyncio.run(taken(one(UploadHeader(digest="x" * 129))))

    def revoked(last: bool) -> None:
        if last:
            raise IdentityError("revoked")

    with pytest.raises(IdentityError):
        asyncio.run(taken(one(most), revoked))


class Taken:
    """An upload of as many bytes as are written."""

    def __init__(self) -> None:
        self.kept = self.finished = 0

    def begin(self) -> int:
        return self.kept

    def write(self, offset: int, data: bytes) -> int:
        assert offset == self.kept
        self.kept += len(data)
        return self.kept

    def finish(self) -> None:
        self.finished += 1

    def close(self) -> None:
        pass


def test_a_sender_is_told_what_is_kept_before_its_window_is_full() -> None:
    upload: Any = Taken()

    async def pieces() -> AsyncIterator[Part]:
        for number in range(17):
            yield Piece(number * CHUNK_BYTES, PIECES[0])

    async def said() -> list[int]:
        return [kept async for kept in transfers.receive(upload, pieces())]

    states = asyncio.run(said())
    assert states[0] == 0 and max(b - a for a, b in pairwise(states)) < WINDOW_BYTES / 2
    assert upload.kept == 17 * CHUNK_BYTES and upload.finished == 1

    async def twice() -> AsyncIterator[Part]:
        yield UploadHeader(digest="x")

    with pytest.raises(InputError, match="a second header"):
        asyncio.run(anext_but_one(transfers.receive(upload, twice())))


def test_an_update_is_not_closed_under_a_check_that_goes_on_when_its_sender_is_gone(caplog: Any) -> None:
    begun, end, done = threading.Event(), threading.Event(), list[str]()

    class Checked(Taken):
        def finish(self) -> None:
            begun.set()
            end.wait()
            done.append("checked")
            raise InputError("0 of 9 bytes came")

        def close(self) -> None:
            done.append("closed")

    async def nothing() -> AsyncIterator[Part]:
        for part in ():
            yield part

    async def drain(upload: Any) -> list[int]:
        return [kept async for kept in transfers.receive(upload, nothing())]

    async def gone() -> None:
        sender = asyncio.create_task(drain(Checked()))
        await asyncio.to_thread(begun.wait)
        sender.cancel()
        asyncio.get_running_loop().call_later(0.01, end.set)
        with pytest.raises(asyncio.CancelledError):
            await sender

    asyncio.run(gone())
    gc.collect()
    assert done == ["checked", "closed"] and not caplog.records


async def anext_but_one(states: AsyncIterator[int]) -> None:
    await anext(states)
    await anext(states)
