"""What a stage of an upload promises: one half at the site, the other at the coordinator.

Stages are given the change since the broadcast, or what the stage before them made of it. The module of a stage loads
no tensor library when it is imported.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from offsite.kernels.schema import Schema, Tensors


@dataclass(frozen=True)
class At:
    """Where a stage works."""

    schema: Schema  # settled: of what its `pack` is given and its `unpack` returns
    key: bytes = b""  # 32 bytes that only the site knows, of this task and stage; none at the coordinator


class Stage(Protocol):
    """A family member: its settings are its fields."""

    name: ClassVar[str]
    hides: ClassVar[bool]  # whether the coordinator can unpack only the sum of all sites' updates
    phases: ClassVar[tuple[str, ...]]  # of the site's work in a round
    noise: float  # standard deviation of what it adds, as a share of the change's rms; 0: it adds nothing

    def schema(self, given: Schema) -> Schema:
        """Return what `pack` makes of a schema, settled if that is; raises ValueError where it cannot be packed."""
        ...

    def pack(self, change: Tensors, at: At) -> Tensors:
        """Return what leaves the site; the same bytes for the same arguments, which stay as they are."""
        ...

    def unpack(self, packed: Tensors, at: At) -> Tensors:
        """Return what the coordinator makes of it; raises ValueError where no `pack` can have made it."""
        ...
