"""Files by digest in one folder; a file is there whole, or not there."""

import os
import shutil
from pathlib import Path

from offsite.protos.chunks import digest_file, is_digest
from offsite.protos.errors import InputError, MismatchError, NotFoundError, ResourceError

MARGIN_BYTES = 64 << 20  # left free on the disk, so that the journal can always be written


class Blobs:
    """A content-addressed folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a blob is; raises NotFoundError when it is not there."""
        path = self._place(digest)
        if not path.is_file():
            raise NotFoundError(f"no blob {digest}")
        return path

    def _place(self, digest: str) -> Path:
        if not is_digest(digest):
            raise InputError(f"{digest!r} is not a digest; expected sha256:<64 hex digits>")
        return self.root / digest[7:9] / digest[9:]

    def __contains__(self, digest: str) -> bool:
        return self._place(digest).is_file()

    def take(self, file: Path, *, digest: str | None = None) -> tuple[str, int]:
        """Move a file in and return (digest, size); durable on return. Raises MismatchError if it is not `digest`."""
        found = digest_file(file)
        if digest is not None and found != digest:
            raise MismatchError(f"{file.name}: its digest is {found}, announced was {digest}")
        size = file.stat().st_size
        place = self._place(found)
        if place.is_file():
            file.unlink()
            return found, size
        place.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.replace(place)
        _sync_folder(place.parent)
        return found, size


def room(folder: Path, size: int) -> None:
    """Raise ResourceError unless the disk under a folder has room for `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if free < size + MARGIN_BYTES:
        need = (size + MARGIN_BYTES) >> 20
        raise ResourceError(
            f"{folder}: the disk has {free >> 20} MiB free, {need} MiB are needed; free some and try again"
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
