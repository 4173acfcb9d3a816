"""What is made of rows, and by whom."""

from collections.abc import Mapping
from typing import Any, Protocol


class Example(Protocol):
    """What is learned from one row. Two are equal, and have the same repr, where all but their place is the same."""

    @property
    def row(self) -> dict[str, Any]:
        """The example as a row that is read as the same."""

    @property
    def place(self) -> str:
        """File and line; empty if it comes from none."""

    @property
    def asked(self) -> str:
        """What comes before what is to be learned, such as a prompt; empty where all of it is."""

    @property
    def characters(self) -> int:
        """How long it is, for its owner to compare with others."""


class Reader(Protocol):
    """A kind of data, as far as it is read."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that may matter; of Parquet no other is even read."""
        ...

    @property
    def shapes(self) -> str:
        """What a row may look like, for messages."""
        ...

    def example(self, row: dict[str, Any], place: str) -> Example:
        """Make an example of the row at a place; raises Fault."""
        ...


class Renaming:
    """A reader of rows whose columns have names of their owner's; one that takes another's name is read for it."""

    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        """Take the names that the reader knows by those of the rows; raises ValueError for one that it does not."""
        if odd := sorted(set(names.values()) - {*reader.columns}):
            raise ValueError(f"columns: {odd[0]!r} is none that is read; expected one of {', '.join(reader.columns)}")
        if len({*names.values()}) < len(names):
            raise ValueError(f"columns: two are to be read as one; there are {', '.join(names.values())}")
        self._reader, self._names = reader, dict(names)

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Reader`."""
        return (*self._names, *self._reader.columns)

    @property
    def shapes(self) -> str:
        """See `Reader`."""
        return f"{self._reader.shapes}, with {', '.join(f'{old!r} as {new!r}' for old, new in self._names.items())}"

    def example(self, row: dict[str, Any], place: str) -> Example:
        """See `Reader`."""
        renamed = {new: row[old] for old, new in self._names.items() if old in row}
        if not renamed:  # so that a message says which columns there are
            return self._reader.example(row, place)
        return self._reader.example({name: row[name] for name in row.keys() - self._names.keys()} | renamed, place)
