"""Who has which rows: one data set cut into those of many virtual sites, the same for the same seed."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from offsite.emulator.examples import Example
from offsite.kernels.plugins import Plugins

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Rows = list[Numbers]  # of each site, the numbers of its rows in their order

BINS = 10  # of lengths, where sites differ by them


class Partition(Protocol):
    """A family member: its settings are its fields."""

    name: ClassVar[str]

    @property
    def column(self) -> str:
        """The column that it looks at; empty: none."""
        ...

    def cut(self, examples: Sequence[Example], labels: Sequence[str], sites: int, draw: np.random.Generator) -> Rows:
        """Return the rows of each site; raises ValueError where there are too few. `labels` are the column's values."""
        ...


PARTITIONS: Plugins[Partition] = Plugins(
    "partition",
    {
        name: f"offsite.deploy.simulation.partition:{name.capitalize()}"
        for name in ("dirichlet", "iid", "key", "length")
    },
    group="offsite.partitions",
)


@dataclass(frozen=True)
class Iid:
    """Every site has rows of all kinds."""

    rows: int = 0  # that each site draws, some of them others' too; 0: each row is at one site

    name: ClassVar[str] = "iid"
    column: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.rows < 0:
            raise ValueError(f"rows must be at least 0, got {self.rows}")

    def cut(self, examples: Sequence[Example], labels: Sequence[str], sites: int, draw: np.random.Generator) -> Rows:
        """Deal the rows out, or let each site draw its own."""
        if self.rows > len(examples):
            raise ValueError(f"each site is to draw {self.rows} rows, the data has {len(examples)}")
        if self.rows:
            return [draw.choice(len(examples), self.rows, replace=False) for _ in range(sites)]
        _enough(examples, sites)
        return [np.sort(part) for part in np.array_split(draw.permutation(len(examples)), sites)]


@dataclass(frozen=True)
class Length:
    """The first site has the shortest rows, the last one the longest."""

    name: ClassVar[str] = "length"
    column: ClassVar[str] = ""

    def cut(self, examples: Sequence[Example], labels: Sequence[str], sites: int, draw: np.random.Generator) -> Rows:
        """Cut the rows in order of their length."""
        _enough(examples, sites)
        return np.array_split(np.argsort([one.characters for one in examples], kind="stable"), sites)


@dataclass(frozen=True)
class Dirichlet:
    """Each kind of row is spread over the sites by shares from a Dirichlet distribution (Hsu, arXiv 1909.06335)."""

    alpha: float = 0.5  # the smaller, the more a site has of few kinds
    column: str = ""  # whose value is the kind; empty: how long a row is, in ten bins of equal numbers

    name: ClassVar[str] = "dirichlet"

    def __post_init__(self) -> None:
        """Check the range."""
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    def cut(self, examples: Sequence[Example], labels: Sequence[str], sites: int, draw: np.random.Generator) -> Rows:
        """Cut each kind by shares of its own; a site that got nothing takes a row of the one that has most."""
        _enough(examples, sites)
        parts: list[list[int]] = [[] for _ in range(sites)]
        for members in _kinds(labels) if self.column else _lengths(examples):
            ends = np.cumsum(draw.dirichlet(np.full(sites, self.alpha)))[:-1] * len(members)
            for site, part in enumerate(np.split(draw.permutation(members), ends.round().astype(int))):
                parts[site] += part.tolist()
        sizes = np.array([len(part) for part in parts])
        for empty in np.flatnonzero(sizes == 0):
            most = int(sizes.argmax())
            parts[empty].append(parts[most].pop())
            sizes[most], sizes[empty] = sizes[most] - 1, 1
        return [np.sort(np.array(part)) for part in parts]


@dataclass(frozen=True)
class Key:
    """Rows with one value of a column, such as an author, are at one site; large ones are dealt out first."""

    column: str

    name: ClassVar[str] = "key"

    def cut(self, examples: Sequence[Example], labels: Sequence[str], sites: int, draw: np.random.Generator) -> Rows:
        """Give each value to the site that has fewest rows so far."""
        values = _kinds(labels)
        if len(values) < sites:
            raise ValueError(f"column {self.column!r} has {len(values)} values, too few for {sites} sites")
        parts: list[list[int]] = [[] for _ in range(sites)]
        order = sorted(values, key=lambda members: (-len(members), members[0]))
        heap = [(0, site) for site in range(sites)]
        for members in order:
            size, site = heapq.heappop(heap)
            parts[site] += members
            heapq.heappush(heap, (size + len(members), site))
        return [np.sort(np.array(part)) for part in parts]


def _enough(examples: Sequence[Example], sites: int) -> None:
    if len(examples) < sites:
        raise ValueError(
            f"the data has {len(examples)} rows, too few for {sites} sites; have each draw some of them: iid(rows=16)"
        )


def _kinds(labels: Sequence[str]) -> list[list[int]]:
    """Return the rows of each value, by value."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [members for _, members in sorted(rows.items())]


def _lengths(examples: Sequence[Example]) -> list[list[int]]:
    """Return the rows in bins by their length."""
    order = np.argsort([one.characters for one in examples], kind="stable")
    return [part.tolist() for part in np.array_split(order, BINS)]
