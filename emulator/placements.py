"""Which layers of an emulator train: a choice of its own, whatever builds the emulator and whatever trains in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from offsite.emulator import catalogue
from offsite.kernels.plugins import Plugins


class Placement(Protocol):
    """A choice of layers; its fields are its settings."""

    name: ClassVar[str]

    def fixed(self, depth: int) -> tuple[int, ...]:
        """Return the layers that train whatever else is kept, which a builder must not drop; raises ValueError."""
        ...

    def choose(self, kept: Sequence[int], depth: int) -> tuple[int, ...]:
        """Return which of the kept layers train, by absolute id; raises ValueError."""
        ...


@dataclass(frozen=True)
class Ends:
    """The lowest `bottom` and the highest `top` layers, as in Offsite-Tuning (arXiv 2302.04870)."""

    bottom: int = 2
    top: int = 2

    name: ClassVar[str] = "ends"

    def fixed(self, depth: int) -> tuple[int, ...]:
        """Return the ends; raises ValueError if there is none, or no layer between them."""
        if self.bottom < 0 or self.top < 0 or not 0 < self.bottom + self.top < depth:
            raise ValueError(
                f"bottom and top must leave a middle: bottom + top must be in 1..{depth - 1} for a base of {depth} "
                f"layers, got {self.bottom} + {self.top}"
            )
        return (*range(self.bottom), *range(depth - self.top, depth))

    def choose(self, kept: Sequence[int], depth: int) -> tuple[int, ...]:
        """Return the ends, which are kept."""
        return self.fixed(depth)


@dataclass(frozen=True)
class Spread:
    """`count` of the kept layers, the first and the last among them, as in CRaSh (arXiv 2310.15477)."""

    count: int = 4

    name: ClassVar[str] = "spread"

    def fixed(self, depth: int) -> tuple[int, ...]:
        """Return nothing: what is kept decides."""
        return ()

    def choose(self, kept: Sequence[int], depth: int) -> tuple[int, ...]:
        """Return the kept layers number ceil(i (k-1)/(count-1)); raises ValueError if they are too few."""
        if not 0 < self.count <= len(kept):
            raise ValueError(f"count must be in 1..{len(kept)}, the layers that are kept, got {self.count}")
        if self.count == 1:
            return (kept[0],)
        return tuple(kept[math.ceil(i * (len(kept) - 1) / (self.count - 1))] for i in range(self.count))


@dataclass(frozen=True)
class Kept:
    """Every layer that is kept: their absolute ids bring what was trained back to the base exactly."""

    name: ClassVar[str] = "kept"

    def fixed(self, depth: int) -> tuple[int, ...]:
        """Return nothing: what is kept decides."""
        return ()

    def choose(self, kept: Sequence[int], depth: int) -> tuple[int, ...]:
        """Return all of them."""
        return tuple(kept)


PLACEMENTS: Plugins[Placement] = catalogue.PLACEMENTS
make = PLACEMENTS.make
