"""Downloads from a coordinator that lies or breaks off: nothing wrong is kept, nothing right is fetched twice."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from blake3 import blake3

from offsite.client.channel import Channel
from offsite.protos.chunks import CHUNK_BYTES, WINDOW_BYTES, digest_bytes
from offsite.protos.errors import InputError, MismatchError, ResourceError, UnreachableError
from offsite.protos.fleet_pb2 import UploadHeader, UploadState
from offsite.protos.frames import Piece
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.transfer_pb2 import DownloadRequest

DATA = bytes(range(256)) * 40
DIGEST = digest_bytes(DATA)
CLOSED = "nothing listens there; check the address and that the coordinator is up"


class Away(grpc.RpcError):
    """What gRPC raises when the connection breaks."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Connection refused"


class Sender:
    """A download method that sends pieces, or names those the caller holds, and notes from where it was asked."""

    def __init__(self, data: bytes = DATA, *, break_at: int | None = None, shift: int = 0, size: int = 1000) -> None:
        self.data, self.break_at, self.shift, self.size = data, break_at, shift, size
        self.offsets: list[int] = []

    def __call__(self, request: DownloadRequest, *, stall_s: float) -> Iterator[Piece]:
        self.offsets.append(request.offset)
        held = [request.held[at : at + 32] for at in range(0, len(request.held), 32)]
        for at in range(request.offset, len(self.data), self.size):
            if self.break_at is not None and at >= self.break_at:
                self.break_at = None
                raise Away
            data = self.data[at : at + self.size]
            if (piece := blake3(data).digest()) in held:
                yield Piece(offset=at, held=held.index(piece))
            else:
                yield Piece(offset=at + self.shift, data=data)


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    kit = Authority.create(tmp_path / "pki").issue("site", "bank")
    made = Channel("127.0.0.1:1", Identity.load(kit), patience_s=5)
    yield made
    made.close()


def test_a_download_that_breaks_off_goes_on_where_it_ended(channel: Channel, tmp_path: Path) -> None:
    sender, said = Sender(break_at=4000), list[str]()
    channel.waiting = said.append
    assert channel.download(sender, DIGEST, tmp_path / "file", size=len(DATA)) == len(DATA)
    assert said == [
        "127.0.0.1:1: nothing listens there; check the address and that the coordinator is up; asking again"
    ]
    assert sender.offsets == [0, 4000] and (tmp_path / "file").read_bytes() == DATA
    assert channel.download(sender, DIGEST, tmp_path / "file") == 0, "what is there is not fetched again"
    assert len(sender.offsets) == 2 and [path.name for path in tmp_path.glob("file*")] == ["file"]


def test_pieces_of_an_earlier_file_are_named_and_not_sent(channel: Channel, tmp_path: Path) -> None:
    pieces = [bytes([number]) * CHUNK_BYTES for number in range(4)]
    (tmp_path / "earlier").write_bytes(b"".join(pieces[:3]) + b"rest")
    new = pieces[2] + pieces[3] + pieces[0] + b"rest"
    sender = Sender(new, size=CHUNK_BYTES, break_at=2 * CHUNK_BYTES)
    path, digest = tmp_path / "file", digest_bytes(new)
    assert channel.download(sender, digest, path, size=len(new), earlier=tmp_path / "earlier") == CHUNK_BYTES
    assert path.read_bytes() == new and sender.offsets == [0, 2 * CHUNK_BYTES]

    class Changing(Sender):
        """Changes the earlier file under the one who downloads."""

        def __call__(self, request: DownloadRequest, *, stall_s: float) -> Iterator[Piece]:
            (tmp_path / "earlier").write_bytes(b"other")
            return super().__call__(request, stall_s=stall_s)

    sender = Changing(new, size=CHUNK_BYTES)
    assert channel.download(sender, digest, tmp_path / "two", earlier=tmp_path / "earlier") == len(new)
    assert (tmp_path / "two").read_bytes() == new and sender.offsets == [0, 0]


def test_a_coordinator_that_names_what_this_end_does_not_hold_is_refused(channel: Channel, tmp_path: Path) -> None:
    def liar(request: DownloadRequest, *, stall_s: float) -> Iterator[Piece]:
        yield Piece(offset=0, held=7)

    with pytest.raises(MismatchError, match="piece 7 of 0"):
        channel.download(liar, DIGEST, tmp_path / "file")


class Keeper:
    """A coordinator's end of an upload: keeps what comes; for a while it says nothing, or it breaks off."""

    def __init__(self, *, break_at: int | None = None) -> None:
        self.data, self.starts, self.break_at = b"", list[int](), break_at

    def Upload(self, parts: Iterator[Any], *, stall_s: float) -> Iterator[UploadState]:
        header = next(parts).header
        self.starts.append(len(self.data))
        yield UploadState(kept=len(self.data))
        for part in parts:
            assert part.offset == len(self.data)
            self.data += part.data
            if self.break_at is not None and len(self.data) >= self.break_at:
                self.break_at = None
                raise Away
            yield UploadState(kept=len(self.data))
        yield UploadState(digest=header.digest)


def test_an_upload_that_breaks_off_goes_on_where_the_coordinator_says(channel: Channel, tmp_path: Path) -> None:
    data = bytes(range(256)) * (10 * CHUNK_BYTES // 256) + b"end"
    (tmp_path / "update").write_bytes(data)
    keeper, header = Keeper(break_at=4 * CHUNK_BYTES), UploadHeader(digest=digest_bytes(data), size=len(data))
    channel.upload(keeper, header, tmp_path / "update")
    assert keeper.data == data and keeper.starts == [0, 4 * CHUNK_BYTES]


def test_an_upload_is_read_no_further_than_a_window_ahead_of_what_is_kept(channel: Channel, tmp_path: Path) -> None:
    with (tmp_path / "update").open("wb") as file:
        file.truncate(5 << 30)  # a sparse file, larger than 32 bits count
    start = (5 << 30) - 3 * WINDOW_BYTES
    read, ahead, threads = list[int](), list[int](), list[threading.Thread]()

    def upload(parts: Iterator[Any], *, stall_s: float) -> Iterator[UploadState]:
        next(parts)
        yield UploadState(kept=start)
        read.extend(part.offset for part in itertools.islice(parts, WINDOW_BYTES // CHUNK_BYTES))
        more = threading.Thread(target=lambda: read.extend(part.offset for part in parts))  # as gRPC reads
        more.start()
        more.join(timeout=0.2)
        ahead.append(len(read))
        yield UploadState(kept=start + CHUNK_BYTES)
        while len(read) == ahead[0]:
            more.join(timeout=0.01)
        threads.append(more)
        raise Away

    channel.patience_s = 0.0
    with pytest.raises(UnreachableError):
        channel.upload(SimpleNamespace(Upload=upload), UploadHeader(digest=DIGEST, size=5 << 30), tmp_path / "update")
    threads[0].join(timeout=30)
    assert not threads[0].is_alive(), "what reads the parts ends with the call"
    assert ahead == [WINDOW_BYTES // CHUNK_BYTES] and read == [start + n * CHUNK_BYTES for n in range(ahead[0] + 1)]


def test_what_another_process_left_half_done_is_taken_up(channel: Channel, tmp_path: Path) -> None:
    channel.patience_s = 0.0
    with pytest.raises(UnreachableError):
        channel.download(Sender(break_at=3000), DIGEST, tmp_path / "file")
    sender = Sender()
    channel.download(sender, DIGEST, tmp_path / "file")
    assert sender.offsets == [3000] and (tmp_path / "file").read_bytes() == DATA


def test_bytes_that_are_not_what_was_named_are_thrown_away(channel: Channel, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(MismatchError, match="its digest is"):
            channel.download(Sender(DATA[:-1] + b"x"), DIGEST, tmp_path / "file")
        assert list(tmp_path.glob("file*")) == []


@pytest.mark.parametrize(
    ("sender", "words"), [(Sender(DATA * 9), "more than the"), (Sender(shift=7), "chunk at byte 7")]
)
def test_more_or_other_bytes_than_announced_are_refused(
    channel: Channel, tmp_path: Path, sender: Any, words: str
) -> None:
    with pytest.raises(MismatchError, match=words):
        channel.download(sender, DIGEST, tmp_path / "file", size=len(DATA))
    assert list(tmp_path.glob("file*")) == [], "nothing that came can be relied on"


def test_a_name_that_is_no_digest_and_a_place_that_cannot_be_written_are_refused(
    channel: Channel, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="is not a digest"):
        channel.download(Sender(), "../../etc/passwd", tmp_path / "file")
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(ResourceError, match="cannot be written"):
        channel.download(Sender(), DIGEST, tmp_path / "taken" / "file")
    with pytest.raises(InputError, match="expected HOST:PORT"):
        Channel("nowhere", Identity.load(tmp_path / "pki" / "bank"))
