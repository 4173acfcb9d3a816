"""A machine's folder for the steps of runs: scratch files, and blobs that lie elsewhere, as long as they are used.

What a step reads and writes beside it goes by digest through the blobs, so that any machine that reaches these can do
it. The owner's key, policy and journal are not among that: they are of the coordinator's `Home`, and stay there.
"""

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.opening import open_blobs

STALE_S = 24 * 3600.0


@dataclass(frozen=True)
class Node:
    """A folder of this machine, and the URL of the blobs."""

    root: Path
    url: str
    desk: Path = Path()  # of one step, for the owner's files that it reads

    @property
    def shared(self) -> bool:
        """Whether the blobs lie beyond this machine, so that others can do the steps, too."""
        return not self.url.startswith("file:")

    def prepare(self) -> "Node":
        """Make the folders, for this account alone; idempotent."""
        for folder in (self.root, self.scratch):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        return self

    @property
    def scratch(self) -> Path:
        """Files under construction."""
        return self.root / "scratch"

    def blobs(self) -> Blobs:
        """Open the blobs."""
        return open_blobs(self.url, cache=self.root / "cache")

    def cached(self) -> int:
        """Return how many bytes lie here of blobs that lie elsewhere, too."""
        sizes = 0
        for file in (self.root / "cache").rglob("*"):
            with suppress(FileNotFoundError):
                sizes += file.stat().st_size if file.is_file() else 0
        return sizes

    def free(self) -> int:
        """Return how many bytes are free on its disk."""
        return shutil.disk_usage(self.root).free

    def sweep(self) -> None:
        """Remove scratch files that kills left behind and nobody has touched for a day."""
        sweep(self.scratch)


def sweep(folder: Path) -> None:
    """Remove what lies in a folder and nobody has touched for a day."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a step has just ended
            touched = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
            if time.time() - touched > STALE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
