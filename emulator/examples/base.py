"""What is made of rows, and by whom."""

from typing import Any, ClassVar, Protocol


class Example(Protocol):
    """What is learned from one row. Two are equal, and have the same repr, where all but their place is the same."""

    @property
    def row(self) -> dict[str, Any]:
        """The example as a row that is read as the same."""

    @property
    def place(self) -> str:
        """File and line; empty if it comes from none."""

    @property
    def characters(self) -> int:
        """How long it is, for its owner to compare with others."""


class Reader(Protocol):
    """A kind of data, as far as it is read."""

    columns: ClassVar[tuple[str, ...]]  # those that may matter; of Parquet no other is even read
    shapes: ClassVar[str]  # what a row may look like, for messages

    def example(self, row: dict[str, Any], place: str) -> Example:
        """Make an example of the row at a place; raises Fault."""
        ...
