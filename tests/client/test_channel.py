"""Downloads from a coordinator that lies or breaks off: nothing wrong is kept, nothing right is fetched twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from offsite.client.channel import Channel
from offsite.protos.chunks import digest_bytes
from offsite.protos.errors import InputError, MismatchError, ResourceError, UnreachableError
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.transfer_pb2 import Chunk, DownloadRequest

DATA = bytes(range(256)) * 40
DIGEST = digest_bytes(DATA)


class Away(grpc.RpcError):
    """What gRPC raises when the connection breaks."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Connection refused"


class Sender:
    """A download method that sends pieces of 1000 bytes and notes from where it was asked."""

    def __init__(self, data: bytes = DATA, *, break_at: int | None = None, shift: int = 0) -> None:
        self.data, self.break_at, self.shift = data, break_at, shift
        self.offsets: list[int] = []

    def __call__(self, request: DownloadRequest, *, stall_s: float) -> Iterator[Chunk]:
        self.offsets.append(request.offset)
        for at in range(request.offset, len(self.data), 1000):
            if self.break_at is not None and at >= self.break_at:
                self.break_at = None
                raise Away
            yield Chunk(offset=at + self.shift, data=self.data[at : at + 1000])


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    kit = Authority.create(tmp_path / "pki").issue("site", "bank")
    made = Channel("127.0.0.1:1", Identity.load(kit), patience_s=5)
    yield made
    made.close()


def test_a_download_that_breaks_off_goes_on_where_it_ended(channel: Channel, tmp_path: Path) -> None:
    sender = Sender(break_at=4000)
    assert channel.download(sender, DIGEST, tmp_path / "file", size=len(DATA)) == len(DATA)
    assert sender.offsets == [0, 4000] and (tmp_path / "file").read_bytes() == DATA
    assert channel.download(sender, DIGEST, tmp_path / "file") == 0, "what is there is not fetched again"
    assert len(sender.offsets) == 2 and [path.name for path in tmp_path.glob("file*")] == ["file"]


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
    assert not (tmp_path / "file").exists()
    assert sum(path.stat().st_size for path in tmp_path.glob("file*")) <= len(DATA)


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
