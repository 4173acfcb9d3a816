"""What every memory promises.

A memory takes each version that a fold gives, with the one before it, and makes of it the one that is kept: what it
needs for that is in the version's state. State travels with a version, so that memory within a run and over the runs
that go on from one another is one thing. It is a pure function of versions: the same ones give the same bytes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from offsite.coordinator.aggregation.base import MEMORY as PREFIX
from offsite.coordinator.aggregation.base import Version
from offsite.kernels.schema import Rule, Schema, Tensors
from offsite.protos.ranges import Name

SUMS = PREFIX + "sums."  # so the names begin of what tasks are known by, which runs keep beside what memories do

__all__ = ["PREFIX", "SUMS", "Combine", "Memory", "Moment"]

Combine = Literal["one", "max", "route"]  # there is one; the largest of their probabilities; the one of a set's task


@dataclass(frozen=True)
class Moment:
    """Where a version is in its run, and what that learns."""

    round: int  # of the run, counted from one; 0: before its first
    rounds: int  # of the run
    steps: int  # of an optimiser, that a site takes in a round
    before: int  # rounds that led to the version that the run goes on from; 0: it begins anew
    task: str  # what the run learns; "": it has no name


class Memory(Protocol):
    """A family member; its settings are its fields. The names of the state that it keeps begin with PREFIX.

    What the sites of each tier start from is made of the adapter by the run's strategy, as that of a round with one
    site: a memory that gives another adapter leaves the broadcasts as they were, unless it makes them itself.
    """

    name: ClassVar[str]
    rules: ClassVar[frozenset[Rule]]  # of a schema's tensors, those that it can accumulate
    accumulates: ClassVar[bool]  # whether it ever changes a version
    replaces: ClassVar[bool]  # whether it may give another adapter than the fold's, for sites to go on from
    paced: ClassVar[bool]  # whether a version depends on how many rounds its run has
    divides: ClassVar[bool]  # whether it keeps by task what is private, of which a method has to have some

    @property
    def combine(self) -> Combine:
        """How its experts answer together."""
        ...

    def begin(self, last: Version, start: Version, schema: Schema, moment: Moment) -> Version:
        """Return what a run begins from, given what it goes on from, and its own start, which changes nothing.

        A run that goes on from no other is given its start as both.
        """
        ...

    def after(self, last: Version, new: Version, schema: Schema, moment: Moment) -> Version:
        """Return what a round ends in, given what it began from and what its fold gave, which has no state of ours."""
        ...

    def experts(self, version: Version) -> dict[Name, Tensors]:
        """Return the adapters by which a version answers, of the run's schema; of a version its state is enough."""
        ...
