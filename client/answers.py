"""What a coordinator answers, as people have it: dataclasses, and no messages of the wire."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from pydantic_core import from_json

from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import plain
from offsite.protos.errors import InputError, MismatchError

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run. `round` is 0 where it does not apply; `at` is in seconds since the epoch."""

    seq: int
    at: float
    kind: str
    round: int
    site: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """A file that a run has published, by a name such as adapter/adapter_model.safetensors; `size` is in bytes."""

    name: str
    digest: str
    size: int


@dataclass(frozen=True)
class Status:
    """How a run stands. Times are in seconds since the epoch, 0 for what has not come; a list's has no artifacts."""

    id: str
    name: str
    owner: str
    state: str  # queued, waiting, running, completed, failed or cancelled
    round: int  # rounds that are over
    rounds: int
    error: str  # why it failed
    note: str  # what it waits for
    submitted_at: float
    finished_at: float
    artifacts: tuple[Artifact, ...]


@dataclass(frozen=True)
class Site:
    """An enrolled site; `seen_at` is when it was last heard, in seconds since the epoch."""

    name: str
    seen_at: float
    examples: int
    version: str


@dataclass(frozen=True)
class Withdrawal:
    """Who took a version back, when, in seconds since the epoch, and why."""

    at: float
    by: str
    reason: str


@dataclass(frozen=True)
class Version:
    """What a round of a run ended in, and what later runs may go on from."""

    run: str
    round: int  # counted from one
    task: str  # that its run learned; empty: it has no name
    owner: str  # who submitted that
    at: float  # when it was there, in seconds since the epoch
    start: str  # RUN:ROUND that its run went on from; empty: from what changes nothing
    figures: dict[str, float]
    sites: tuple[str, ...]  # whose updates are in it
    state: tuple[str, ...]  # what the owner keeps of it for later rounds, by its name
    digest: str  # of what goes into the base
    kept: int  # bytes of its state, as far as that is still there
    withdrawal: Withdrawal | None  # None: it was not taken back

    @property
    def id(self) -> str:
        """RUN:ROUND, as `start` takes it."""
        return f"{self.run}:{self.round}"


def copied(cls: type[T], message: Any, **others: Any) -> T:
    """Return a dataclass with what the fields of a message hold, or `others`."""
    names = {field.name for field in fields(cls)} - others.keys()  # type: ignore[arg-type]  # it is a dataclass
    return cls(**{name: getattr(message, name) for name in names}, **others)


def version_of(message: pb.Version) -> Version:
    """Read a version."""
    return copied(
        Version,
        message,
        figures=dict(message.figures),
        sites=tuple(message.sites),
        state=tuple(message.state),
        withdrawal=copied(Withdrawal, message.withdrawal) if message.HasField("withdrawal") else None,
    )


def event_of(message: pb.Event) -> Event:
    """Read an event; raises MismatchError for one that is not as the protocol has it."""
    try:
        data = from_json(message.data or "{}", allow_inf_nan=False)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise MismatchError(f"event {message.seq} of the run holds no JSON table; the coordinator is another version")
    return copied(Event, message, kind=plain(message.kind, most=64), site=plain(message.site, most=64), data=data)


def numbered(version: str) -> tuple[str, int]:
    """Part RUN:ROUND, the round 0 of a run alone; raises InputError."""
    run, colon, number = version.partition(":")
    if not run or (colon and not (number.isdecimal() and 0 < int(number) < 2**32)):
        raise InputError(f"{version!r}: expected RUN:ROUND, such as {run or 'a1b2c3d4'}:2")
    return run, int(number or 0)
