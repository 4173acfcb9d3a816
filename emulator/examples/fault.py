"""Why a row, a file or the rest of one cannot be learned from."""

from collections.abc import Iterable
from typing import Any

QUOTED = 200  # characters of a value that a message repeats at most

NO_SHAPE = "rows with columns of another shape"


class Fault(ValueError):
    """A sentence for the data's owner, and a reason without a word of the data by which faults are counted.

    Args:
        reason: what is left out, in the plural: "rows that are not JSON".
        sentence: what is wrong here.
        count: how many are left out with it.
        place: the file, and the line or the row in it.
    """

    def __init__(self, reason: str, sentence: str, *, count: int = 1, place: str = "") -> None:
        super().__init__(shown(sentence))
        self.reason, self.count, self.place = reason, count, place

    def at(self, place: str) -> "Fault":
        """Return the same with the place where it is."""
        return Fault(self.reason, f"{place}: {self}", count=self.count, place=self.place or place)


def strange_columns(columns: Iterable[str], shapes: str, *, count: int = 1) -> Fault:
    """Say which columns there are where those of no shape are."""
    return Fault(NO_SHAPE, f"found the columns {quoted(sorted(columns))}; expected {shapes}", count=count)


def shown(text: str) -> str:
    """Return a text, such as a path or a library's message, as a line that a terminal can show."""
    return "".join(character if character.isprintable() else "?" for character in text)


def quoted(value: Any) -> str:
    """Show a value, or the beginning of a long one."""
    shown = value[: QUOTED + 1] if isinstance(value, str | bytes | list | tuple) else value
    text = repr(shown)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]} ..."
