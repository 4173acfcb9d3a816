"""Updates that are written past the cache: every byte is there, wherever it was cut, and on any file system."""

import fcntl
import os
from pathlib import Path

import pytest

from offsite.coordinator.service.spool import BLOCK, SpoolFile
from offsite.protos.chunks import CHUNK_BYTES

DATA = os.urandom(2 * CHUNK_BYTES + 3 * BLOCK + 7)


def write(path: Path, *sizes: int) -> None:
    """Write DATA in pieces of these sizes, the last of what is left, from where the file ends."""
    file, at = SpoolFile(path), path.stat().st_size
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
    file = SpoolFile(tmp_path / "update")
    file.write(DATA[:CHUNK_BYTES])
    assert fcntl.fcntl(file._file, fcntl.F_GETFL) & os.O_DIRECT
    file.write(DATA[CHUNK_BYTES : CHUNK_BYTES + 5])
    assert not fcntl.fcntl(file._file, fcntl.F_GETFL) & os.O_DIRECT
    file.close()
