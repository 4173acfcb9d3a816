"""What every check promises.

A check is a function of numbers: what they are measured on are the owner's probes, texts that the run names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

from offsite.protos.documents import document
from offsite.protos.figures import Score
from offsite.protos.ranges import TEXT, Flag, Word


@document
class Finding:
    """Whether a check holds, and what it measured."""

    check: Word
    holds: Flag
    reason: Annotated[str, Field(max_length=TEXT)]


@dataclass(frozen=True)
class Evidence:
    """What is known of a run's outcome. Of a probe each row has a score; of one of pairs, two: chosen, rejected."""

    figures: Mapping[str, float] = field(default_factory=dict)  # perplexities over all held-out sets
    base: Mapping[str, Sequence[Score]] = field(default_factory=dict)  # by probe
    plug_in: Mapping[str, Sequence[Score]] = field(default_factory=dict)
    licence: str = ""  # that the base's folder states; empty: none


class Check(Protocol):
    """A family member; its settings are its fields."""

    name: ClassVar[str]

    @property
    def texts(self) -> tuple[str, ...]:
        """The probes that it reads, of rows to be predicted."""
        ...

    @property
    def pairs(self) -> tuple[str, ...]:
        """Those of two answers each."""
        ...

    def judge(self, evidence: Evidence) -> Finding:
        """Tell whether it holds; raises ValueError where that cannot be told from so few rows."""
        ...


class Unprobed:
    """What a check declares that reads no probe."""

    texts: ClassVar[tuple[str, ...]] = ()
    pairs: ClassVar[tuple[str, ...]] = ()


def nats(score: Score) -> float:
    """Return the loss of a row in nats, infinite where it is no finite number."""
    return float("inf") if score.nll is None else score.nll
