"""What virtual sites are like: how fast they train and transfer, when they are there, how often they give up.

    steps_per_s = "lognormal(median=0.5, sigma=0.6)"  # a number for all, or a distribution over the sites: this one,
    down_mbit_s = "uniform(low=5, high=50)"           # this one, or constant(value)
    up_mbit_s   = 4.0
    available   = 0.7                                 # share of the time that a site is there
    session_s   = 3600.0                              # how long on average until it goes away
    dropout     = 0.05                                # share of the tasks that are taken and not finished
    trace       = "phones.csv"                        # beside this file: what is known of some sites

A trace is a CSV file with the columns site, and any of steps_per_s, down_mbit_s, up_mbit_s, dropout and sessions: when
the site is there, as BEGIN-END in seconds since the first round began, several separated by blanks, and repeated from
the end of the last one if the world has a `period_s`. What it leaves out is drawn as for all others.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

from offsite.kernels.plugins import make
from offsite.protos.documents import Written, document, from_toml
from offsite.protos.errors import InputError
from offsite.protos.ranges import AboveZero, Place, Share
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Choice

Sessions = tuple[tuple[float, float], ...]


class Distribution(Protocol):
    """How a property is spread over the sites."""

    name: ClassVar[str]

    def draw(self, random: Random) -> float:
        """Draw a site's value."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same for all."""

    value: float
    name: ClassVar[str] = "constant"

    def draw(self, random: Random) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class Uniform:
    """Anything between two bounds alike."""

    low: float
    high: float
    name: ClassVar[str] = "uniform"

    def draw(self, random: Random) -> float:
        """Draw between the bounds."""
        return random.uniform(self.low, self.high)


@dataclass(frozen=True)
class Lognormal:
    """The logarithm is normal, as speeds of machines and networks often are: a few are far from the median."""

    median: float
    sigma: float
    name: ClassVar[str] = "lognormal"

    def draw(self, random: Random) -> float:
        """Draw about the median."""
        return self.median * random.lognormvariate(0.0, self.sigma)


DISTRIBUTIONS: dict[str, type[Distribution]] = {cls.name: cls for cls in (Constant, Uniform, Lognormal)}


def _distribution(text: str) -> Choice:
    try:
        return parse_one(text)
    except InputError as error:
        raise ValueError(str(error)) from None


Spread = AboveZero | Annotated[Choice, Written(_distribution, most=200)]


@document
class World:
    """A TOML file with these keys; without one a round takes no time and everybody is there."""

    steps_per_s: Spread = 1.0
    down_mbit_s: Spread = 100.0
    up_mbit_s: Spread = 20.0
    available: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    session_s: AboveZero = 3600.0
    dropout: Share = 0.0
    trace: Place = ""
    period_s: AboveZero | None = None  # after which the sessions of a trace begin again

    @classmethod
    def load(cls, path: Path) -> "World":
        """Read a file, whose trace is beside it; raises InputError."""
        world = from_toml(cls, path)
        return replace(world, trace=str((path.absolute().parent / world.trace).resolve())) if world.trace else world


@dataclass(frozen=True)
class Nature:
    """What one site is like; speeds in steps and in bytes a second."""

    steps_per_s: float
    down: float
    up: float
    dropout: float
    sessions: Sessions | None = None  # None: drawn


def natures(world: World, seed: int) -> Callable[[str], Nature]:
    """Return what tells of a site, by its name and the seed alone; raises InputError for a bad world or trace."""
    spreads = {name: _spread(name, getattr(world, name)) for name in ("steps_per_s", "down_mbit_s", "up_mbit_s")}
    known = _trace(Path(world.trace)) if world.trace else {}

    def nature(site: str) -> Nature:
        random, own = Random(f"{seed} nature {site}"), known.get(site, {})
        value = {name: spread.draw(random) for name, spread in spreads.items()} | {"dropout": world.dropout}
        value |= {name: number for name, number in own.items() if name != "sessions"}
        if min(value["steps_per_s"], value["down_mbit_s"], value["up_mbit_s"]) <= 0:
            raise InputError(f"site {site}: a speed of {min(value.values()):g}; the world's speeds must be above 0")
        down, up = value["down_mbit_s"] * 125_000, value["up_mbit_s"] * 125_000
        return Nature(value["steps_per_s"], down, up, value["dropout"], own.get("sessions"))

    return nature


def _spread(name: str, value: Any) -> Distribution:
    choice = value if isinstance(value, Choice) else Choice(name="constant", settings={"value": value})
    try:
        return make("distribution", DISTRIBUTIONS, choice.name, choice.settings)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _trace(path: Path) -> dict[str, dict[str, Any]]:
    """Read what is known of some sites."""
    columns = {"steps_per_s", "down_mbit_s", "up_mbit_s", "dropout"}
    known: dict[str, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                where = f"{path}, line {number}"
                if strange := sorted(str(name) for name in row.keys() - columns - {"site", "sessions"}):
                    raise InputError(f"{where}: column {strange[0]!r} is none of site, sessions, {', '.join(columns)}")
                if not row.get("site"):
                    raise InputError(f"{where}: names no site")
                own: dict[str, Any] = {name: _number(row[name], where) for name in columns if row.get(name)}
                if row.get("sessions"):
                    own["sessions"] = _sessions(row["sessions"], where)
                known[row["site"]] = own
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: the trace cannot be read: {error}") from None
    return known


def _number(text: str, where: str) -> float:
    try:
        if 0 <= (value := float(text)) < 1e12:
            return value
    except ValueError:
        pass
    raise InputError(f"{where}: {text[:40]!r} is not a number of at least 0")


def _sessions(text: str, where: str) -> Sessions:
    sessions: list[tuple[float, float]] = []
    for part in text.split():
        begin, _, end = part.partition("-")
        sessions.append((_number(begin, where), _number(end, where)))
        if sessions[-1][0] >= sessions[-1][1] or (len(sessions) > 1 and sessions[-2][1] > sessions[-1][0]):
            raise InputError(f"{where}: session {part!r}: expected BEGIN-END in seconds, one after the other")
    return tuple(sessions)
