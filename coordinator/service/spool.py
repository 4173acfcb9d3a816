"""An update's file as it comes, written past the system's cache of files where its file system allows that.

It is read when the round is folded, which can be hours away, and what sites download again and again should not make
room for it in memory. To go through the cache would also cost more of a processor than all else that is done with a
piece of an update.
"""

import fcntl
import mmap
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

BLOCK = 4096  # bytes: of what is written past the cache, place, size and address in memory are multiples
BUFFER_BYTES = 2 << 20  # of one write: a large page of memory, which a disk takes at once and not in hundreds of parts

_disk = ThreadPoolExecutor(max_workers=4, thread_name_prefix="spool")


class SpoolFile:
    """A file that grows by pieces; what is written of it survives the death of this process.

    Past the cache one waits for the disk itself, so pieces are gathered in one buffer while the other one is written.
    """

    def __init__(self, path: Path, size: int = BUFFER_BYTES) -> None:
        """Open a file to go on at its end, or a new one, for so many bytes."""
        self._file = path.open("ab", buffering=0)
        self._free, self._busy = (_memory(min(BUFFER_BYTES, max(1, size))) for _ in range(2))
        self._filled = 0
        self._direct = self._file.tell() % BLOCK == 0 and self._pass_cache(True)
        self._write: Future[None] | None = None  # from the buffer that is busy

    def _pass_cache(self, pass_: bool) -> bool:
        """Have what follows written past the cache, or no longer; return whether it is."""
        if sys.platform != "linux":
            return False
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_DIRECT if pass_ else flags)
        except OSError:  # of a file system in memory, and others
            return False
        return pass_

    def write(self, data: bytes | memoryview) -> None:
        """Append a piece; raises OSError where an earlier one could not be written."""
        rest = memoryview(data)
        while rest:
            part = rest[: len(self._free) - self._filled]
            self._free[self._filled : self._filled + len(part)] = part
            self._filled, rest = self._filled + len(part), rest[len(part) :]
            if self._filled == len(self._free):
                self._begin()

    def _begin(self) -> None:
        """Begin to write what there is, once what came before is written."""
        self._wait()
        if self._direct and self._filled % BLOCK:  # the last of all
            self._direct = self._pass_cache(False)
        self._free, self._busy = self._busy, self._free
        self._write = _disk.submit(self._append, self._busy[: self._filled])
        self._filled = 0

    def _append(self, rest: memoryview) -> None:
        while rest:
            rest = rest[self._file.write(rest) :]

    def _wait(self) -> None:
        write, self._write = self._write, None
        try:
            if write:
                write.result()
        except OSError:
            self._filled = 0  # after a gap, what follows must not be written: a resumed upload goes on at the end
            raise

    def flush(self) -> None:
        """Return once all pieces are written; raises OSError."""
        if self._filled:
            self._begin()
        self._wait()

    def close(self) -> None:
        """Write what there is, if that can be, and close the file."""
        with suppress(OSError):
            self.flush()
        self._file.close()


def _memory(size: int) -> memoryview:
    """Return whole blocks of memory for so many bytes, in large pages where the system has them."""
    memory = mmap.mmap(-1, -(-size // BLOCK) * BLOCK)
    if sys.platform == "linux":
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
