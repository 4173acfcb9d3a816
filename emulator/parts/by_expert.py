"""Experts (MoSA, Zhang et al., arXiv 2312.02923): in each round a site trains those tensors that are one expert's.

A group is an expert's if its name ends in a number, as "28.mlp.down_proj.2" does; all others train at every site. Which
expert a site begins with is drawn from the run's seed and its name, and in each later round it is the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.parts.base import Turn, refuse_choice
from offsite.emulator.parts.draws import drawn
from offsite.kernels.schema import Schema, groups


@dataclass(frozen=True)
class ByExpert:
    """Take the experts in turn."""

    name: ClassVar[str] = "by-expert"
    partial: ClassVar[bool] = True
    starts: ClassVar[bool] = False

    @property
    def alike(self) -> bool:
        """Whether all sites of a round train the same: each has its own expert."""
        return False

    def fits(self, schema: Schema) -> None:
        """Raise ValueError if the adapter has fewer than two experts."""
        if (count := len({*_experts(schema).values()} - {None})) < 2:
            raise ValueError(
                f"part by-expert takes the experts of an adapter in turn, and this one has {count}; use a method with "
                "some, or part all"
            )

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return the groups of one expert, and those that are none's; raises ValueError."""
        refuse_choice(self, chosen)
        self.fits(schema)
        experts = _experts(schema)
        numbers = sorted({number for number in experts.values() if number is not None})
        (first,) = drawn(numbers, 1, self.name, turn.seed, turn.site)
        number = numbers[(numbers.index(first) + turn.round) % len(numbers)]
        return frozenset(group for group, own in experts.items() if own in (number, None))


def _experts(schema: Schema) -> dict[str, int | None]:
    """Return for each group the number of its expert, or None."""
    ends = {group: group.rpartition(".")[2] for group in groups(schema)}
    return {group: int(end) if end.isdecimal() else None for group, end in ends.items()}
