"""Reading a file or a folder of examples, strictly or with a count of what is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offsite.emulator.examples.census import Census, Counter
from offsite.emulator.examples.fault import Fault, shown
from offsite.emulator.examples.files import HARMLESS, UNREADABLE, paths
from offsite.emulator.examples.formats import rows
from offsite.emulator.examples.shapes import SHAPES, Example, example


@dataclass(frozen=True)
class Reading:
    """Examples, and what was counted while they were read."""

    examples: list[Example]
    census: Census


def read(path: Path, *, folders: Sequence[Path] = ()) -> list[Example]:
    """Read a file, or the files in a folder and those below it in order of their names, and leave out no row.

    Files that are hidden or have another ending are no data; links are followed, within `folders` if any are given.
    Raises ValueError that names the file, the line (in Parquet the row) and what was expected there.
    """
    return collect(path, folders=folders, odd_rows="refuse").examples


def collect(path: Path, *, folders: Sequence[Path] = (), odd_rows: Literal["skip", "refuse"] = "skip") -> Reading:
    """Read as `read` does, but leave out what cannot be learned from, counted, unless odd rows are to be refused.

    Raises ValueError if nothing is left, and with odd_rows="refuse" at the first that would be left out.
    """
    counter = Counter()
    examples: list[Example] = []
    for file, fault in paths(path, folders=folders):
        for one in [fault] if fault else _examples(file):
            if isinstance(one, Example):
                examples.append(one)
                counter.add(one)
            elif odd_rows == "refuse" and one.reason not in HARMLESS:
                raise ValueError(str(one)) from one
            else:
                counter.leave_out(one)
        counter.files += not fault
    if not examples:
        first = next((one.first for one in counter.census.left_out), "")
        raise ValueError(shown(f"{path}: holds no example; {first or f'expected {SHAPES}'}"))
    return Reading(examples, counter.census)


def _examples(file: Path) -> Iterator[Example | Fault]:
    """Yield a file's examples, and between them what is wrong where."""
    place = ""
    try:
        for place, row in rows(file):
            try:
                yield example(row, f"{file}, {place}")
            except Fault as odd:
                yield odd.at(f"{file}, {place}")
    except Fault as rest:
        yield rest.at(f"{file}, after {place}" if place else str(file))
    except OSError as error:
        yield Fault(UNREADABLE, f"cannot be read: {error.strerror or error}").at(str(file))
