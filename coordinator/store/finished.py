"""Results kept as they come, so that long work that was killed goes on where it was."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from offsite.protos.chunks import digest_bytes, hex_of
from offsite.protos.documents import canonical, from_json, to_json
from offsite.protos.errors import OffsiteError

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A folder of results, each under the digest of all that it depends on."""

    folder: Path

    def __call__(self, cls: type[T], depends: dict[str, Any], compute: Callable[[], T]) -> T:
        """Return the document that was kept for this, else compute and keep it."""
        known = self.known(cls, depends)
        if known is not None:
            return known
        document, path = compute(), self._path(depends)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(to_json(document))
        partial.replace(path)
        return document

    def known(self, cls: type[T], depends: dict[str, Any]) -> T | None:
        """Return the document that was kept for this, if there is one that can be read."""
        path = self._path(depends)
        if not path.exists():
            return None
        try:
            return from_json(cls, path.read_bytes(), where=str(path))
        except OffsiteError:
            return None  # of another version, or cut off by a full disk: it is computed again

    def _path(self, depends: dict[str, Any]) -> Path:
        return self.folder / f"{self.name(depends)}.json"

    def name(self, depends: dict[str, Any]) -> str:
        """Return a name for what depends on this, the same whenever it is asked for."""
        return hex_of(digest_bytes(canonical(depends)), most=32)
