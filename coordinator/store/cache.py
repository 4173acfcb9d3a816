"""Blobs that are kept elsewhere, and here as long as they are used: a folder within a bound."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from offsite.coordinator.store.blobs import Folder
from offsite.protos.errors import MismatchError

USED_S = 3600.0  # a caller may go on reading a path for so long after it asked for it


class Cache(Folder):
    """A folder of at most `most` bytes, and of what was used within the last hour; the longest unused go first."""

    def __init__(self, root: Path, *, most: int) -> None:
        super().__init__(root)
        self._most = most

    def keep(self, file: Path, digest: str, *, soon: bool = True) -> int:
        """See `Folder`; others make room for it."""
        size = super().keep(file, digest)
        self._use(digest)
        self._shrink()
        return size

    def _file(self, digest: str) -> Path:
        self._use(digest)
        return super()._file(digest)

    def _judge(self, path: Path, digest: str, actual: str) -> None:
        if actual != digest:
            path.unlink(missing_ok=True)
            raise MismatchError(f"{path}: the file had changed since it was stored; it is fetched again, ask once more")

    def _use(self, digest: str) -> None:
        """Note when a file was used, as its time of access; that of its change tells whether it was checked."""
        place = self._place(digest)
        with self._locked(fcntl.LOCK_SH), suppress(FileNotFoundError):
            os.utime(place, ns=(time.time_ns(), place.stat().st_mtime_ns))

    def _shrink(self) -> None:
        files = []
        for _, path in self._files():
            with suppress(FileNotFoundError):  # another process removed it
                about = path.stat()
                files.append((about.st_atime_ns, about.st_size, path))
        surplus = sum(size for _, size, _ in files) - self._most
        for used, size, path in sorted(files):
            if surplus <= 0 or used > time.time_ns() - USED_S * 1e9:
                return
            with self._locked(fcntl.LOCK_EX), suppress(FileNotFoundError):  # nobody begins to use it meanwhile
                if path.stat().st_atime_ns == used:
                    path.unlink()
            surplus -= size
