"""A trainer on a machine with little memory."""

import resource
from pathlib import Path

from offsite.client.site import trainer

ROOM = 56 << 20  # for all that a trainer makes once its libraries are there

preload = trainer.preload


def main(path: Path) -> int:
    """Train within the room."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return trainer.main(path)
