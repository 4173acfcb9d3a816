"""Reading a file or a folder of examples, strictly or with a count of what is left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from offsite.emulator.examples.base import Example, Reader, Renaming
from offsite.emulator.examples.census import Census, Counter
from offsite.emulator.examples.fault import Fault, shown
from offsite.emulator.examples.files import HARMLESS, UNREADABLE, paths
from offsite.emulator.examples.formats import rows

NO_OBJECT = "rows that are no objects"

OddRows = Literal["skip", "refuse"]  # what becomes of rows that cannot be learned from


@dataclass(frozen=True)
class Reading:
    """Examples, and what was counted while they were read."""

    examples: list[Example]
    census: Census


def collect(path: Path, reader: Reader, *, folders: Sequence[Path] = (), odd_rows: OddRows = "skip") -> Reading:
    """Read a file, or the files in a folder and those below it in order of their names.

    Files that are hidden or have another ending are no data; links are followed, within `folders` if any are given.
    What cannot be learned from is left out and counted, unless odd rows are to be refused: then ValueError names the
    file, the line (in Parquet the row) and what was expected there. It is also raised if nothing is left.
    """
    counter = Counter()
    examples: list[Example] = []
    for file, fault in paths(path, folders=folders):
        for one in [fault] if fault else _examples(file, reader):
            if not isinstance(one, Fault):
                examples.append(one)
                counter.add(one)
            elif odd_rows == "refuse" and one.reason not in HARMLESS:
                raise ValueError(str(one)) from one
            else:
                counter.leave_out(one)
        counter.files += not fault
    if not examples:
        first = next((one.first for one in counter.census.left_out), "")
        raise ValueError(shown(f"{path}: holds no example; {first or f'expected {reader.shapes}'}"))
    return Reading(examples, counter.census)


@dataclass(frozen=True)
class Source:
    """Where rows are, and how they are read."""

    path: Path
    folders: Sequence[Path] = ()  # out of which no link leads; empty: anywhere
    odd_rows: OddRows = "skip"
    columns: Mapping[str, str] = field(default_factory=dict)  # as their owner calls them -> as they are read

    def collect(self, reader: Reader, *, odd_rows: OddRows | None = None) -> Reading:
        """Read them, odd ones otherwise if told so; raises ValueError as `collect` does."""
        own = Renaming(reader, self.columns) if self.columns else reader
        return collect(self.path, own, folders=self.folders, odd_rows=odd_rows or self.odd_rows)


def _examples(file: Path, reader: Reader) -> Iterator[Example | Fault]:
    """Yield a file's examples, and between them what is wrong where."""
    place = ""
    try:
        for place, row in rows(file, reader):
            where = f"{file}, {place}"
            try:
                if isinstance(row, Fault):
                    raise row
                if not isinstance(row, dict):
                    expected = f"expected an object of the shape {reader.shapes}"
                    raise Fault(NO_OBJECT, f"{expected}, found {type(row).__name__}")
                yield reader.example(row, where)
            except Fault as odd:
                yield odd.at(where)
    except Fault as rest:
        yield rest.at(f"{file}, after {place}" if place else str(file))
    except OSError as error:
        yield Fault(UNREADABLE, f"cannot be read: {error.strerror or error}").at(str(file))
