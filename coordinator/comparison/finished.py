"""What a comparison has measured so far, kept so that one that was killed goes on where it was."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import canonical, from_json, to_json
from offsite.protos.errors import OffsiteError

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A folder of results, each under the digest of all that it depends on."""

    folder: Path

    def __call__(self, cls: type[T], depends: dict[str, Any], compute: Callable[[], T]) -> T:
        """Return the document that was kept for this, else compute and keep it."""
        path = self.folder / f"{self.name(depends)}.json"
        if path.exists():
            try:
                return from_json(cls, path.read_bytes(), where=str(path))
            except OffsiteError:
                pass  # of another version, or cut off by a full disk: it is computed again
        found = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(to_json(found))
        partial.replace(path)
        return found

    def name(self, depends: dict[str, Any]) -> str:
        """Return a name for what depends on this, the same whenever it is asked for."""
        return digest_bytes(canonical(depends)).removeprefix("sha256:")[:32]
