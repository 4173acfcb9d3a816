"""What a folder of data amounts to, in numbers: what is read, what is there twice, and what is left out and why."""

from dataclasses import dataclass, field
from hashlib import blake2b

from offsite.emulator.examples.base import Example
from offsite.emulator.examples.fault import Fault


@dataclass(frozen=True)
class LeftOut:
    """What is left out for one reason."""

    reason: str  # in the plural, without a word of the data
    count: int
    first: str  # a sentence with file and line, for the data's owner alone


@dataclass(frozen=True)
class Census:
    """The numbers of one reading."""

    files: int
    examples: int
    distinct: int  # examples that are not equal to an earlier one
    characters: int
    longest: int  # characters of the longest example
    left_out: tuple[LeftOut, ...] = ()

    def describe(self) -> list[tuple[str, str]]:
        """Return (what, how much) rows for people."""
        mean = self.characters // max(self.examples, 1)
        rows = [
            ("examples", f"{self.examples:,} in {self.files:,} files"),
            ("their length", f"{mean:,} characters on average, {self.longest:,} the longest"),
            ("duplicates", f"{self.examples - self.distinct:,}, so that {self.distinct:,} are distinct"),
        ]
        rows += [("left out", f"{one.count:,} {one.reason}; first {one.first}") for one in self.left_out]
        return rows


@dataclass
class Counter:
    """Counts while examples are read."""

    files: int = 0
    examples: int = 0
    characters: int = 0
    longest: int = 0
    _seen: set[bytes] = field(default_factory=set)
    _left_out: dict[str, LeftOut] = field(default_factory=dict)

    def add(self, example: Example) -> None:
        """Count an example."""
        self.examples += 1
        self.characters += example.characters
        self.longest = max(self.longest, example.characters)
        self._seen.add(blake2b(repr(example).encode(), digest_size=16).digest())

    def leave_out(self, fault: Fault) -> None:
        """Count what is left out; the first sentence of each reason is kept."""
        before = self._left_out.get(fault.reason, LeftOut(fault.reason, 0, str(fault)))
        self._left_out[fault.reason] = LeftOut(fault.reason, before.count + fault.count, before.first)

    @property
    def census(self) -> Census:
        """The numbers so far."""
        return Census(
            files=self.files,
            examples=self.examples,
            distinct=len(self._seen),
            characters=self.characters,
            longest=self.longest,
            left_out=tuple(self._left_out.values()),
        )
