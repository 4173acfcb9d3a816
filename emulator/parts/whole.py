"""The whole adapter, in every round and at every site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.parts.base import Turn, refuse_choice
from offsite.kernels.schema import Schema, groups


@dataclass(frozen=True)
class Whole:
    """Train all that the method trains."""

    name: ClassVar[str] = "all"
    partial: ClassVar[bool] = False
    starts: ClassVar[bool] = False

    @property
    def alike(self) -> bool:
        """Whether all sites of a round train the same: they do."""
        return True

    def fits(self, schema: Schema) -> None:
        """Any adapter will do."""

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return all groups; raises ValueError for a choice."""
        refuse_choice(self, chosen)
        return frozenset(groups(schema))
