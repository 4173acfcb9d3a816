"""What the steps of a run give, and the names under which the journal keeps it."""

from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from pydantic import Field

from offsite.coordinator.bundles.manifests import Bundle
from offsite.coordinator.gates.base import Finding
from offsite.coordinator.runs.grant import Input
from offsite.coordinator.runs.steps.orders import Outlined, Update
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.emulator.evaluation.portion import Portion
from offsite.protos.documents import document
from offsite.protos.figures import PLUG_IN, Score
from offsite.protos.ranges import (
    TEXT,
    AboveZero,
    Amount,
    Count,
    Digest,
    Finite,
    Line,
    Moment,
    Name,
    Place,
    Positive,
    Share,
    Tier,
)
from offsite.protos.spec import BaseRef, Choice, Span

Message = Annotated[str, Field(max_length=TEXT)]
R = TypeVar("R")


@document
class Inputs:
    """The owner's files that a run reads."""

    places: dict[Place, Input]  # the model and the texts, as the run names them
    spans: tuple[Span, ...] = ()


@document
class Built(Bundle):
    """The bundle and the version of the first round, and what was chosen and counted when they were built."""

    version: Version
    tiers: dict[Name, Tier]  # site -> what of the adapter it trains
    schema: Digest  # what adapters are made of
    schemas: dict[Tier, Digest] = Field(default_factory=dict)  # settled, by tier; where a round trains a part of it
    groups: Positive = 1  # of its tensors that may be folded apart, by the run's strategy
    anchors: dict[Tier, Stored] = Field(default_factory=dict)  # what sites are held to, by the run's retention
    update_sizes: dict[Tier, Amount]  # bytes of the tensors of an update
    method: Choice  # as sites are told it
    method_hash: Digest  # of the base, the method and the layers it trains
    base: BaseRef
    learning_rate: AboveZero
    computed: Message  # in which precision, and why
    vocabulary: Count | None = None
    recovery: Digest | None  # what brings an adapter back to the base; None: nothing is needed
    portions: dict[str, Portion] = Field(default_factory=dict)  # of the base's layers; kept with all disclosures
    spans: tuple[Span, ...] = ()


@document
class Division:
    """A build for several nodes to go on with, or one that could not be divided."""

    built: Built | None = None  # which it is then
    outline: Outlined | None = None
    weights: Digest | None = None  # the file of how much each input of a map counts
    places: Positive = 1  # that can be encoded apart
    spans: tuple[Span, ...] = ()


@document
class Encoded:
    """What the maps of some places are stored as."""

    file: Digest
    spans: tuple[Span, ...] = ()


@document
class Realigned(Bundle):
    """The bundle of later rounds."""

    spans: tuple[Span, ...] = ()


@document
class Roster:
    """The sites that are asked for an update in a round."""

    tiers: dict[Name, Tier]  # site -> what of the adapter it trains
    joined: dict[Name, Tier] = Field(default_factory=dict)  # those that take part from this round on


@document
class Closing:
    """The updates that a round ends with; decided once, before they are folded."""

    updates: tuple[Update, ...]


@document
class Part:
    """A site's part in a version."""

    update: Digest | None  # None: of a simulation, whose updates are no files that stay
    weight: Share


@document
class LatePart(Part):
    """The part of a site whose update was asked for in an earlier round."""

    age: Positive  # rounds since then


@document
class Folded:
    """The version that a round ends in, and where it comes from."""

    version: Version
    lineage: dict[Name, Part]
    late: dict[Name, LatePart] = Field(default_factory=dict)  # beside those of the round
    left_out: dict[Name, Message] = Field(default_factory=dict)  # site -> why its update is not in it
    spans: tuple[Span, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """Return whose updates are in it, by name."""
        return tuple(sorted({*self.lineage, *self.late}))


@document
class Compared:
    """How alike the updates of a round are to their mean; empty where they are of no values that can be compared."""

    cosines: dict[Name, Finite]  # of a site's change with the mean of all
    spans: tuple[Span, ...] = ()


@document
class Stop:
    """Where a run stopped before its last round, and why."""

    round: Positive  # the last one that was done
    best: Positive  # the round whose version was the best
    reason: Message


@document
class Evaluation:
    """One figure."""

    sets: dict[Name, Score]
    experts: dict[Name, dict[Name, Score]] = Field(default_factory=dict)  # of an ensemble, what each gives alone
    spans: tuple[Span, ...] = ()


@document
class Attacked(Evaluation):
    """What one attack made of the emulator."""

    name: Line  # what was done


@document
class Attacks:
    """What a family of attacks made of it, the strongest first."""

    attacks: Annotated[tuple[Attacked, ...], Field(min_length=1)]
    spans: tuple[Span, ...] = ()


@document
class Publication:
    """The outcome of a run."""

    artifacts: dict[Place, Stored]  # by path
    spans: tuple[Span, ...] = ()


@document
class Verdict:
    """What a run's gate has found of its outcome."""

    findings: tuple[Finding, ...]
    spans: tuple[Span, ...] = ()

    @property
    def against(self) -> str:
        """Why nothing of the run is published; empty: all of its gate holds."""
        return "; ".join(f"{one.check}: {one.reason}" for one in self.findings if not one.holds)


@document
class Release:
    """Who lets out what a gate holds back, when, and why."""

    by: Line
    at: Moment
    reason: Message


@document
class Selection:
    """The sites of a run."""

    names: tuple[Name, ...]


@dataclass(frozen=True)
class Step(Generic[R]):
    """Something that is done once: its name in the journal, and what it gives."""

    name: str
    gives: type[R]


SELECT = Step("sites", Selection)
GATHER = Step("inputs", Inputs)
BUILD = Step("version:0", Built)
ATTACK = Step("attack", Attacks)
STOP = Step("stop", Stop)
GATE = Step("gate", Verdict)
PUBLISH = Step("publish", Publication)
LAST = Step("publish:last", Publication)


def roster(number: int) -> Step[Roster]:
    """Return the step that opens a round, counted from one."""
    return Step(f"roster:{number}", Roster)


def closing(number: int) -> Step[Closing]:
    """Return the step that closes a round, counted from one."""
    return Step(f"close:{number}", Closing)


def fold(number: int) -> Step[Folded]:
    """Return the step that ends a round, counted from one."""
    return Step(f"version:{number}", Folded)


def compare(number: int) -> Step[Compared]:
    """Return the step that compares the updates of a round, counted from one."""
    return Step(f"compared:{number}", Compared)


def without(number: int, site: str) -> Step[Folded]:
    """Return the step that folds a round, counted from one, without one of its sites."""
    return Step(f"without:{number}:{site}", Folded)


def lacking(number: int, site: str) -> Step[Evaluation]:
    """Return the step that measures the plug-in of that."""
    return Step(f"{PLUG_IN}:{number}:without:{site}", Evaluation)


def release(number: int) -> Step[Release]:
    """Return the step that lets out the version of a round, counted from one; 0: all of the run."""
    return Step(f"release:{number}", Release)


def realign(number: int) -> Step[Realigned]:
    """Return the step that makes the bundle of a round, counted from zero as the rounds of tasks are."""
    return Step(f"bundle:{number}", Realigned)


def evaluate(figure: str) -> Step[Evaluation]:
    """Return the step that measures a figure."""
    return Step(figure, Evaluation)
