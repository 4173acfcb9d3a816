"""Events: what those who watch a run are told. The coordinator writes them, a client reads them.

Each is a document; `kind` names it in the journal and on the wire. `round` counts from one.
"""

from dataclasses import fields
from typing import Annotated, Any, ClassVar

from pydantic import Field

from offsite.protos.documents import document, parse, to_plain
from offsite.protos.exams import Exam
from offsite.protos.figures import Score
from offsite.protos.ranges import TEXT, Amount, AtLeastZero, Count, Finite, Line, Name, Positive, Word
from offsite.protos.spec import Layers

LINES, LINE = 5, 200  # of a site's log: how many, of how many characters

Message = Annotated[str, Field(max_length=TEXT)]
Lines = Annotated[tuple[Line, ...], Field(max_length=LINES)]


@document
class Waiting:
    """A run waits for sites; `present` are those that are here."""

    kind: ClassVar[str] = "waiting"
    sites: tuple[Name, ...]  # that it names and that are not here; empty: any would do
    present: tuple[Name, ...]


@document
class Selected:
    """The sites of a run are chosen, and it begins."""

    kind: ClassVar[str] = "selected"
    sites: tuple[Name, ...]


@document
class StepBegun:
    """A step of the coordinator's begins; again where its process was killed in the course of it."""

    kind: ClassVar[str] = "step"
    step: Word


@document
class StepLost:
    """What did a step of the coordinator's went away under it; the step begins again."""

    kind: ClassVar[str] = "lost"
    step: Word
    message: Message  # how


@document
class EmulatorBuilt:
    """What sites will train on is built."""

    kind: ClassVar[str] = "bundle"
    layers: Layers
    bytes: Amount
    disclosed: AtLeastZero  # parameters of the base that it holds as they are, as a share of all
    learning_rate: AtLeastZero
    computed: Message  # in which precision, and why


@document
class Measured:
    """A figure was measured on the held-out data."""

    kind: ClassVar[str] = "figure"
    name: Word
    sets: dict[Name, Score]


@document
class Warned:
    """What a careful reader would object to."""

    kind: ClassVar[str] = "warning"
    message: Message


@document
class SiteOut:
    """A site takes part no longer: a person ejected it, or it has left."""

    kind: ClassVar[str] = "out"
    site: Name
    by: Line
    reason: Line


@document
class RoundBegun:
    """Sites are asked for the updates of a round."""

    kind: ClassVar[str] = "begun"
    round: Positive
    sites: Count
    joined: tuple[Name, ...] = ()  # those that take part from this one on


@document
class Usage:
    """What the first process that trains at a site has used of its machine so far."""

    memory_bytes: Amount  # the most that was resident
    cpu_s: AtLeastZero  # processor time
    gpu_bytes: Amount = 0  # the most that was kept for tensors on its GPU


@document
class SiteState:
    """How far a site is with its task of a round, or why it is done without an update."""

    kind: ClassVar[str] = "site"
    round: Positive
    site: Name
    state: Word
    message: Message = ""
    step: Count = 0
    steps: Count = 0
    loss: Finite | None = None
    bytes_down: Amount = 0
    usage: Usage | None = None  # where the site's policy lets it out
    lines: Lines | None = None  # the last ones of its trainer's log, likewise


@document
class UpdateAccepted:
    """A site's update of a round is kept."""

    kind: ClassVar[str] = "update"
    round: Positive
    site: Name
    loss: Finite
    bytes: Amount
    examples: Count
    exam: Exam | None = None  # how it did on the site's held-out rows, where it tells


@document
class Examined:
    """A site has measured the version that a round ended in on its held-out rows, without training it."""

    kind: ClassVar[str] = "exam"
    round: Positive
    site: Name
    exam: Exam


@document
class RoundDone:
    """The updates of a round are averaged."""

    kind: ClassVar[str] = "round"
    round: Positive
    sites: Count  # whose updates are in it
    figures: dict[Word, Finite | None]


@document
class Stopped:
    """The run takes no further round, as its versions have got no better for as long as it has patience."""

    kind: ClassVar[str] = "stopped"
    round: Positive  # the last one
    best: Positive  # the round whose version is the best
    message: Message


@document
class Held:
    """The run's gate does not hold: nothing of it is published, and nobody goes on from it."""

    kind: ClassVar[str] = "held"
    message: Message


@document
class Released:
    """The owner has let out what the run's gate held back: the version of a round, or all of the run."""

    kind: ClassVar[str] = "released"
    round: Count  # 0: all
    by: Line
    reason: Message


@document
class Withdrawn:
    """The version that a round ended in was taken back: nobody goes on from it."""

    kind: ClassVar[str] = "withdrawn"
    round: Positive
    by: Line
    reason: Message


@document
class Completed:
    """The run is over and has its outcome."""

    kind: ClassVar[str] = "completed"
    error: ClassVar[str] = ""


@document
class Failed:
    """The run is over without an outcome."""

    kind: ClassVar[str] = "failed"
    error: Message


@document
class Cancelled:
    """The run was ended by a person."""

    kind: ClassVar[str] = "cancelled"
    error: Message


End = Completed | Failed | Cancelled
Event = (
    Waiting
    | Selected
    | StepBegun
    | StepLost
    | EmulatorBuilt
    | Measured
    | Warned
    | SiteOut
    | RoundBegun
    | SiteState
    | UpdateAccepted
    | Examined
    | RoundDone
    | Stopped
    | Held
    | Released
    | Withdrawn
    | Completed
    | Failed
    | Cancelled
)
EVENTS: dict[str, type[Event]] = {event.kind: event for event in Event.__args__}


def data(event: Event) -> dict[str, Any]:
    """Return an event's fields as plain data, without those that are not known."""
    return {name: value for name, value in to_plain(event).items() if value is not None}


def read(kind: str, data: dict[str, Any], *, round: int = 0, site: str = "") -> Event:
    """Read an event of a kind in EVENTS; `round` and `site` travel beside its data. Raises InputError."""
    event = EVENTS[kind]
    beside = {"round": round, "site": site}
    own = {field.name: beside[field.name] for field in fields(event) if field.name in beside}
    return parse(event, data | own, where=f"event {kind}")
