"""What a Ray cluster is made of and at work on, as documents."""

import platform
from importlib.metadata import version
from typing import Annotated

from pydantic import Field

from offsite.protos.documents import document
from offsite.protos.ranges import AtLeastZero, Count, Flag, Line, Sentence, Word

VERSION_LABEL = "offsite-version"  # of a machine: the Offsite that is installed there

Resources = Annotated[dict[Word, AtLeastZero], Field(max_length=64)]  # CPU, GPU, memory in bytes, and what has a name
Many = Field(max_length=100_000)


def label() -> str:
    """Return the version of Offsite that is installed here, as a label of Ray's may be written."""
    return version("offsite").replace("+", "-").replace("!", "-")


@document
class Machine:
    """A machine of a cluster. One that is not alive is kept for a while, with why it is gone."""

    id: Word
    address: Line
    head: Flag = False
    alive: Flag
    gone: Sentence = ""
    offsite: Line = ""  # its version there; empty: whoever started Ray there did not say
    resources: Resources = Field(default_factory=dict)
    free: Resources = Field(default_factory=dict)

    @property
    def fit(self) -> bool:
        """Whether it can do what a coordinator of this version asks for."""
        return self.alive and self.offsite == label()


@document
class Actor:
    """A process that has a name: a run's supervisor, or what a machine's steps are forked from."""

    name: Line
    state: Word
    address: Line = ""  # of its machine; empty while it waits for one


@document
class Demand:
    """Equal tasks that wait for a machine with these resources and labels free."""

    count: Count
    resources: Resources = Field(default_factory=dict)
    labels: Annotated[dict[Word, Line], Field(max_length=64)] = Field(default_factory=dict)

    def fits(self, machine: Machine) -> bool:
        """Whether a machine could do one of them, were it idle."""
        has = machine.resources
        labels = {VERSION_LABEL: machine.offsite}
        return (
            machine.alive
            and all(has.get(name, 0) >= much for name, much in self.resources.items())
            and all(labels.get(name) == value for name, value in self.labels.items() if name in labels)
        )


@document
class View:
    """A cluster as its head sees it."""

    address: Line
    ray: Line
    python: Line
    mismatch: Sentence = ""  # why this machine's Ray or Python cannot take part; empty: they can
    machines: Annotated[tuple[Machine, ...], Many]
    actors: Annotated[tuple[Actor, ...], Many] = ()
    waiting: Annotated[tuple[Demand, ...], Many] = ()

    def at(self, address: str) -> Machine | None:
        """Return the machine of an address; None if there is none that is alive."""
        return next((machine for machine in self.machines if machine.alive and machine.address == address), None)


def here() -> str:
    """Say which Ray and Python this machine has."""
    return f"Ray {version('ray')} and Python {platform.python_version()}"
