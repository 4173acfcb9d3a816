"""The data of virtual sites: one set that is cut into theirs, or a file or folder for each."""

from pathlib import Path
from re import fullmatch
from typing import Any, ClassVar, Protocol

import numpy as np

from offsite.deploy.simulation.partition import PARTITIONS, Numbers
from offsite.emulator import modality, objectives
from offsite.emulator.examples import Example, OddRows, Reader, Reading, collect
from offsite.emulator.examples.census import Counter
from offsite.protos.errors import InputError
from offsite.protos.spec import OBJECTIVE, Choice

MOST_SITES = 100_000  # names that a run's documents hold


class Data(Protocol):
    """Who has which examples; made anew in each process from the same files, it is the same."""

    names: list[str]  # of the sites, sorted

    def reading(self, site: str) -> Reading:
        """Return what a site reads; raises ValueError where it cannot."""
        ...

    @property
    def counts(self) -> list[int] | None:
        """Rows of each site, if that is known before they are read."""
        ...


class Cut:
    """One file or folder, cut by a partition."""

    def __init__(
        self, path: Path, sites: int, partition: Choice, *, seed: int, odd_rows: OddRows, reader: Reader
    ) -> None:
        """Read the set and cut it; raises ValueError, and InputError for a partition that is none."""
        way = PARTITIONS.make(partition.name, partition.settings)
        labelling = _Labelling(reader, way.column)
        self._whole = collect(path, labelling, odd_rows=odd_rows)
        labels = [labelling.labels[one.place] for one in self._whole.examples] if way.column else []
        self._rows = way.cut(self._whole.examples, labels, sites, np.random.default_rng(seed))
        width = max(4, len(str(sites)))
        self.names = [f"site-{number:0{width}}" for number in range(1, sites + 1)]
        self._number = {name: number for number, name in enumerate(self.names)}

    @property
    def counts(self) -> list[int] | None:
        """Rows of each site."""
        return [len(rows) for rows in self._rows]

    def reading(self, site: str) -> Reading:
        """Return a site's rows, counted as if they were all that was read."""
        return _reading(self._whole, self._rows[self._number[site]])


def _reading(whole: Reading, rows: Numbers) -> Reading:
    examples, counter = [whole.examples[row] for row in rows], Counter(files=1)
    for example in examples:
        counter.add(example)
    return Reading(examples, counter.census)


class _Labelling:
    """Reads what a modality reads, and keeps the value of one more column by the row's place."""

    columns: ClassVar[tuple[str, ...]]
    shapes: ClassVar[str]

    def __init__(self, reader: Any, column: str) -> None:
        self._reader, self._column = reader, column
        self.columns, self.shapes = (*reader.columns, *([column] if column else [])), reader.shapes  # type: ignore[misc]
        self.labels: dict[str, str] = {}

    def example(self, row: dict[str, Any], place: str) -> Example:
        example: Example = self._reader.example(row, place)
        if self._column:
            if self._column not in row:
                raise InputError(f"{place}: has no column {self._column!r}; it has {', '.join(sorted(row))[:200]}")
            self.labels[place] = str(row[self._column])
        return example


class Apart:
    """A folder with a file or a folder for each site, which is called as that is, without its ending."""

    def __init__(self, path: Path, *, odd_rows: OddRows, reader: Reader) -> None:
        """Look who there is; raises InputError."""
        entries = {entry.name.partition(".")[0]: entry for entry in sorted(path.iterdir()) if entry.name[0] != "."}
        if strange := [name for name in entries if not fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name)]:
            raise InputError(f"{path / strange[0]}: no name of a site: letters, digits, '_' and '-', at most 64")
        if not entries:
            raise InputError(f"{path}: holds no file and no folder; expected one for each site")
        self.names = sorted(entries)
        self.counts: list[int] | None = None
        self._entries, self._odd_rows, self._reader = entries, odd_rows, reader

    def reading(self, site: str) -> Reading:
        """Read a site's file or folder."""
        return collect(self._entries[site], self._reader, odd_rows=self._odd_rows)


def open_data(
    path: Path,
    sites: int | None,
    partition: Choice,
    *,
    seed: int,
    odd_rows: OddRows,
    objective: Choice = OBJECTIVE,
) -> Data:
    """Return the data of so many sites, or of those that a folder has; raises InputError."""
    reader = objectives.make(objective.name, objective.settings).reader(modality.default())
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; --data names a data set, or a folder with one per site")
    if sites is None and not path.is_dir():
        raise InputError(f"{path}: into how many sites is it to be cut? give --sites N, or a folder with one per site")
    try:
        if sites is None:
            return Apart(path, odd_rows=odd_rows, reader=reader)
        return Cut(path, sites, partition, seed=seed, odd_rows=odd_rows, reader=reader)
    except ValueError as error:
        raise InputError(str(error)) from error
