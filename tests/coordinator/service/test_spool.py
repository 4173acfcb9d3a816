"""Updates that are written past the cache: every byte is there, wherever it was cut, and on any file system."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from offsite.coordinator.service.spool import BLOCK, BUFFER_BYTES, SpoolFile
from offsite.protos.chunks import CHUNK_BYTES

DATA = os.urandom(2 * CHUNK_BYTES + 3 * BLOCK + 7)


def write(path: Path, *sizes: int) -> None:
    """Write DATA in pieces of these sizes, the last of what is left, from where the file ends."""
    file, at = SpoolFile(path, len(DATA)), path.stat().st_size
    for size in (*sizes, CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES):
        file.write(DATA[at : at + size])
        at += len(DATA[at : at + size])
    file.close()


@pytest.mark.parametrize("sizes", [(), (BLOCK,), (5,), (BLOCK, 5, BLOCK), (CHUNK_BYTES, 0)])
@pytest.mark.parametrize("kept", [0, BLOCK, BLOCK + 1])
def test_what_is_written_is_what_was_given(tmp_path: Path, sizes: tuple[int, ...], kept: int) -> None:
    path = tmp_path / "update"
    path.write_bytes(DATA[:kept])
    write(path, *sizes)
    assert path.read_bytes() == DATA


def test_a_file_system_in_memory_will_do(tmp_path: Path) -> None:
    memory = Path("/dev/shm") / f"offsite-test-{os.getpid()}"
    if not memory.parent.is_dir():
        pytest.skip("no file system in memory here")
    try:
        write(memory)
        assert memory.read_bytes() == DATA
    finally:
        memory.unlink()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux's own")
def test_pieces_pass_the_cache_but_for_a_last_one(tmp_path: Path) -> None:
    file = SpoolFile(tmp_path / "update", len(DATA))
    file.write(DATA[:CHUNK_BYTES])
    file.flush()
    assert fcntl.fcntl(file._file, fcntl.F_GETFL) & os.O_DIRECT
    file.write(DATA[CHUNK_BYTES : CHUNK_BYTES + 5])
    file.flush()
    assert not fcntl.fcntl(file._file, fcntl.F_GETFL) & os.O_DIRECT
    file.close()


def test_what_was_taken_is_written_when_its_sender_goes(tmp_path: Path) -> None:
    file = SpoolFile(tmp_path / "update", len(DATA))
    file.write(DATA[: BLOCK + 5])
    file.close()
    assert (tmp_path / "update").read_bytes() == DATA[: BLOCK + 5]


@pytest.mark.parametrize("size", [1, BLOCK, BUFFER_BYTES, BUFFER_BYTES + 1])
def test_a_small_update_takes_no_more_memory_than_it_is_large(tmp_path: Path, size: int) -> None:
    file = SpoolFile(tmp_path / "update", size)
    assert len(file._free) == len(file._busy) == min(BUFFER_BYTES, -(-size // BLOCK) * BLOCK)
    file.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's own")
def test_a_full_disk_is_heard_of_before_an_update_is_taken_for_whole() -> None:
    file = SpoolFile(Path("/dev/full"), BLOCK)
    file.write(b"x" * 5)
    with pytest.raises(OSError, match="No space"):
        file.flush()
    file.close()


def test_after_a_write_that_fails_nothing_is_written_where_it_does_not_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, append, full = os.urandom(3 * BUFFER_BYTES), SpoolFile._append, [True]

    def once(file: SpoolFile, rest: memoryview) -> None:
        if full and full.pop():
            append(file, rest[:BLOCK])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, rest)

    monkeypatch.setattr(SpoolFile, "_append", once)
    file = SpoolFile(tmp_path / "update", len(data))
    with pytest.raises(OSError, match="No space"):
        file.write(data)
    file.close()
    assert (tmp_path / "update").read_bytes() == data[:BLOCK]
