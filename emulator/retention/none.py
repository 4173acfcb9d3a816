"""No retention: a site trains on its rows alone."""

from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.retention.base import Unanchored


@dataclass(frozen=True)
class Plain(Unanchored):
    """Let training forget what it will."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""
    active: ClassVar[bool] = False
