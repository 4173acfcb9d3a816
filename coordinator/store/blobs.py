"""Files by digest; a file is there whole, or not there. This store is a folder, `bucket.py` one on S3."""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Protocol

from offsite.protos.chunks import ALGORITHMS, algorithm_of, digest_file, hex_of, is_digest
from offsite.protos.documents import document
from offsite.protos.errors import InputError, MismatchError, NotFoundError, ResourceError
from offsite.protos.ranges import Amount, Digest, Moment, Nanoseconds

FRESH_S = 600.0
COPY_BYTES = 1 << 20
MARGIN_BYTES = 64 << 20  # left free on the disk, so that the journal can always be written

log = logging.getLogger(__name__)


@document
class Stored:
    """A file that was stored, by name."""

    digest: Digest
    size: Amount


@document
class Stamp:
    """When a blob's bytes were checked, and what its file was then, for a process of the same machine that reads it.

    Whoever writes to a file changes its size or its time, and then its bytes are checked again. What alone is missed is
    what a disk loses by itself within FRESH_S, of bytes that the system mostly still has in its memory.
    """

    at: Moment
    size: Amount
    mtime_ns: Nanoseconds


class Blobs(Protocol):
    """Files by digest, wherever they are kept; what is read of them are files of this machine.

    Where they cannot be reached, each method raises Unusable.
    """

    def check(self) -> None:
        """Raise Unusable if they cannot be reached now."""

    def path(self, digest: str, stamp: Stamp | None = None) -> Path:
        """Where a blob is, its bytes checked; raises NotFoundError, or MismatchError when they have changed.

        Not again if a stamp tells that they were within the last minutes, and that its file is as it was.
        """

    def stamp(self, digest: str) -> Stamp:
        """Check a blob's bytes, as `path` does, and tell of it."""

    def served(self, digest: str) -> Path:
        """The same for a file that is sent again and again: checked when it was not within the last minutes."""

    def passed(self, digest: str) -> tuple[Path, Callable[[str], None] | None]:
        """Where a blob is that is about to be read whole, and what to tell the digest that it is read with.

        That raises MismatchError when its bytes have changed; it is None if they were checked within the last minutes.
        """

    def __contains__(self, digest: str) -> bool: ...

    def size(self, digest: str) -> int:
        """Return how many bytes a blob has; raises NotFoundError."""

    def copy(self, digest: str, file: Path) -> None:
        """Make a new file of a blob, another name of the same bytes where that can be; raises NotFoundError.

        Its bytes are for the caller to check.
        """

    def take(self, file: Path, *, digest: str | None = None) -> tuple[str, int]:
        """Move a file in and return (digest, size); durable on return. Raises MismatchError if it is not `digest`."""
        actual = digest_file(file, like=digest or "blake3:")
        if digest is not None and actual != digest:
            raise MismatchError(f"{file.name}: its digest is {actual}, announced was {digest}")
        return actual, self.keep(file, actual)

    def keep(self, file: Path, digest: str, *, soon: bool = True) -> int:
        """Move in a file whose digest the caller has seen and return its size; durable on return.

        `soon` says that it may be read soon, and should be near.
        """

    def share(self, file: Path) -> tuple[str, int]:
        """Take in a copy of somebody's file, unless it is there and young, and return (digest, size).

        Durable on return. Raises MismatchError if the file changes meanwhile.
        """

    def sweep(self, keep: set[str], *, before: float, dry_run: bool = False) -> tuple[int, int]:
        """Remove the blobs that are not to be kept and were stored before a time; return how many, and bytes."""


class Folder(Blobs):
    """A content-addressed folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder("blake3").mkdir(parents=True, exist_ok=True)
        self._checked: dict[str, tuple[tuple[int, int], float]] = {}  # digest -> its file's state, and when

    def check(self) -> None:
        """Nothing: it was made if it was missing."""

    def path(self, digest: str, stamp: Stamp | None = None) -> Path:
        """Where a blob is, its bytes checked; raises NotFoundError, or MismatchError when they have changed.

        Not again if a stamp tells that they were within the last minutes, and that its file is as it was.
        """
        path = self._file(digest)
        seen = stamp and 0 <= time.time() - stamp.at < FRESH_S and (stamp.size, stamp.mtime_ns) == _state(path)
        if not seen:
            self._judge(path, digest, digest_file(path, like=digest))
        return path

    def stamp(self, digest: str) -> Stamp:
        """Check a blob's bytes, as `path` does, and tell of it."""
        at, (size, mtime_ns) = time.time(), _state(self._file(digest))  # before they are read
        self.path(digest)
        return Stamp(at=at, size=size, mtime_ns=mtime_ns)

    def served(self, digest: str) -> Path:
        """The same for a file that is read again and again: checked when it was not within the last minutes."""
        path, judge = self.passed(digest)
        if judge:
            judge(digest_file(path, like=digest))
        return path

    def passed(self, digest: str) -> tuple[Path, Callable[[str], None] | None]:
        """Where a blob is that is about to be read whole, and what to tell the digest that it is read with.

        That raises MismatchError when its bytes have changed; it is None if they were checked within the last minutes.
        """
        path = self._file(digest)
        state = _state(path)
        checked = self._checked.get(digest)
        if checked is not None and checked[0] == state and time.monotonic() - checked[1] < FRESH_S:
            return path, None

        def judge(actual: str) -> None:
            self._judge(path, digest, actual)
            now = time.monotonic()
            fresh = {one: mark for one, mark in self._checked.items() if now - mark[1] < FRESH_S}
            self._checked = {**fresh, digest: (state, now)}  # a dict that nobody changes: several threads look

        return path, judge

    def _file(self, digest: str) -> Path:
        path = self._place(digest)
        if not path.is_file():
            raise NotFoundError(f"{self.root}: no blob {digest}; put it back from a backup, or submit the run again")
        return path

    def _judge(self, path: Path, digest: str, actual: str) -> None:
        if actual != digest:
            error = MismatchError(
                f"{path}: the file has changed since it was stored (its digest is {actual[:19]}...); look at the disk, "
                "then put the file back from a backup, or submit the run again"
            )
            log.error("%s", error)
            raise error

    def _place(self, digest: str) -> Path:
        if not is_digest(digest):
            raise InputError(f"{digest!r} is not a digest; expected blake3:<64 hex digits>")
        digits = hex_of(digest)
        return self._folder(algorithm_of(digest)) / digits[:2] / digits[2:]

    def _folder(self, algorithm: str) -> Path:
        """Where the blobs of an algorithm are; those of SHA-256 lie where they lay before there was another."""
        return self.root if algorithm == "sha256" else self.root / algorithm

    def __contains__(self, digest: str) -> bool:
        return self._place(digest).is_file()

    def size(self, digest: str) -> int:
        """Return how many bytes a blob has; raises NotFoundError."""
        return self._file(digest).stat().st_size

    def copy(self, digest: str, file: Path) -> None:
        """Make a new file of a blob: a link on the same disk."""
        source = self._file(digest)
        try:
            file.hardlink_to(source)
        except OSError:  # of another disk, or one that knows no links
            room(file.parent, source.stat().st_size)
            shutil.copyfile(source, file)

    def keep(self, file: Path, digest: str, *, soon: bool = True) -> int:
        """Move in a file whose digest the caller has seen and return its size; durable on return."""
        size = file.stat().st_size
        place = self._place(digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_SH):
            if place.is_file() and digest_file(place, like=digest) == digest:  # else it has rotted, and is replaced
                os.utime(place)
                file.unlink()
                return size
            move(file, place)
        return size

    def share(self, file: Path) -> tuple[str, int]:
        """Take in a copy of somebody's file and return (digest, size); durable on return."""
        digest = digest_file(file)
        folder = self._place(digest).parent
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, NamedTemporaryFile(dir=folder, delete=False) as copy:  # swept if it is left
            shutil.copyfileobj(source, copy, COPY_BYTES)
        return self.take(Path(copy.name), digest=digest)

    def sweep(self, keep: set[str], *, before: float, dry_run: bool = False) -> tuple[int, int]:
        """Remove the blobs that are not to be kept and were stored before a time; return how many, and bytes."""
        files = size = 0
        for digest, path in self._files():
            if digest in keep:
                continue
            with self._locked(fcntl.LOCK_EX):  # nobody finds it there meanwhile
                about = path.stat()
                if about.st_mtime >= before:
                    continue
                if not dry_run:
                    path.unlink()
            files, size = files + 1, size + about.st_size
        return files, size

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield each blob's digest and place."""
        for algorithm in ALGORITHMS:
            for path in self._folder(algorithm).glob("??/*"):
                yield f"{algorithm}:{path.parent.name}{path.name}", path

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with (self.root / "lock").open("w") as handle:
            fcntl.flock(handle, how)
            yield


def room(folder: Path, size: int, *, what: str = "") -> None:
    """Raise ResourceError unless the disk under a folder has room for `size` more bytes, and say for what."""
    free = shutil.disk_usage(folder).free
    if free < size + MARGIN_BYTES:
        need = (size + MARGIN_BYTES) >> 20
        raise ResourceError(
            f"{folder}: the disk has {free >> 20} MiB free, {need} MiB are needed{f' for {what}' if what else ''}; "
            "free some and try again"
        )


def _state(path: Path) -> tuple[int, int]:
    """What tells that a file may have changed."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def move(file: Path, place: Path) -> None:
    """Move a file, durable before it has its new name, and by that on return; of another disk it is copied there first.

    A copy that a kill leaves behind is no blob's, and is swept with what no run needs.
    """
    try:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        room(place.parent, file.stat().st_size)
        with file.open("rb") as source, NamedTemporaryFile(dir=place.parent, delete=False) as copy:
            shutil.copyfileobj(source, copy, COPY_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(copy.name, place)
        file.unlink()
    for folder in (place.parent, place.parent.parent):  # which may be as new as the file
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
