"""What a stage of an upload promises: one half at the site, the other at the coordinator.

Stages are given the change since the broadcast (of sparse matrices, whose entries sites choose, and of bits and
codes, the values themselves), or what the stage before them made of it, a group of the schema at a
time: what is folded together is packed together, and neither end holds more than the largest group in memory. A cast, a
sign or the largest values of each group need no more. A stage that must see all groups at once, as a bound on the norm
of the whole change or the largest values of all, says that it is `whole`; its chain then works on all tensors together,
and the memory it takes is that of the whole change.

What a lossy stage leaves out can be fed back (error feedback): its `feedback` is true, and the chain adds at the site
what the last round's `unpack` did not give back to what the stage is given in this one. Nothing is fed back of
tensors that are fixed, of integers, and of local and sparse ones, whose entries mean others in each round.

The module of a stage loads no tensor library when it is imported.
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
    hides: ClassVar[bool]  # whether only the sum of all sites' updates can be unpacked; no run may ask for that so far
    phases: ClassVar[tuple[str, ...]]  # of a round in which it has work at the site; so far a run may ask for "train"
    whole: ClassVar[bool]  # whether it works on all groups at once

    @property
    def noise(self) -> float:
        """Standard deviation of what it adds, as a share of the change's rms; 0: it adds nothing."""
        ...

    @property
    def feedback(self) -> bool:
        """Whether what it leaves out stays at the site and is added to the next round's change; never if it hides."""
        ...

    def schema(self, given: Schema) -> Schema:
        """Return what `pack` makes of a schema, settled if that is; raises ValueError where it cannot be packed."""
        ...

    def pack(self, change: Tensors, at: At) -> Tensors:
        """Return what leaves the site; the same bytes for the same arguments, which stay as they are."""
        ...

    def unpack(self, packed: Tensors, at: At) -> Tensors:
        """Return what the coordinator makes of it; raises ValueError where no `pack` can have made it."""
        ...
