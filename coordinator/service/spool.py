"""An update's file as it comes, written past the system's cache of files where its file system allows that.

It is read when the round is folded, which can be hours away, and what sites download again and again should not make
room for it in memory. To go through the cache would also cost more of a processor than all else that is done with a
piece of an update.
"""

import fcntl
import os
import sys
from mmap import mmap
from pathlib import Path

from offsite.protos.chunks import CHUNK_BYTES

BLOCK = 4096  # bytes: of what is written past the cache, place, size and address in memory are multiples


class SpoolFile:
    """A file that grows by pieces of at most CHUNK_BYTES; what is written survives the death of this process."""

    def __init__(self, path: Path) -> None:
        """Open a file to go on at its end, or a new one."""
        self._file = path.open("ab", buffering=0)
        self._buffer = memoryview(mmap(-1, CHUNK_BYTES))
        self._direct = self._file.tell() % BLOCK == 0 and self._pass_cache(True)

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
        """Append a piece."""
        rest = memoryview(data)
        if self._direct and len(rest) % BLOCK:  # the last piece
            self._direct = self._pass_cache(False)
        if self._direct:
            self._buffer[: len(rest)] = rest
            rest = self._buffer[: len(rest)]
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
