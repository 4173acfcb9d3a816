"""What is a task's own: of what tasks share nothing trains, as in MHR-z (Caccia et al., arXiv 2211.03831).

Those groups train of which all is private (`kernels.schema.Field.private`), such as the router's rows of `mhr`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.parts.base import Turn, refuse_choice
from offsite.kernels.schema import Rule, Schema, groups


@dataclass(frozen=True)
class ByTask:
    """Leave what tasks share as it is."""

    name: ClassVar[str] = "by-task"
    partial: ClassVar[bool] = True
    starts: ClassVar[bool] = True  # it does nothing without what is shared

    @property
    def alike(self) -> bool:
        """Whether all sites of a round train the same."""
        return True

    def fits(self, schema: Schema) -> None:
        """Raise ValueError if an adapter has nothing of that kind, or nothing else."""
        private = self._private(schema)
        if not private or private == groups(schema).keys():
            raise ValueError(
                f"part by-task trains what is a task's own and leaves what tasks share, and this adapter has "
                f"{'nothing else' if private else 'no tensors of that kind'}; use a method with both, or part all"
            )

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return the groups that are a task's own; raises ValueError."""
        refuse_choice(self, chosen)
        self.fits(schema)
        return self._private(schema)

    def _private(self, schema: Schema) -> frozenset[str]:
        return frozenset(
            group
            for group, keys in groups(schema).items()
            if all(schema[key].private == schema[key].shape[0] for key in keys if schema[key].rule is not Rule.FIXED)
            and any(schema[key].private for key in keys)
        )
