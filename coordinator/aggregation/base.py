"""What every strategy promises.

A strategy folds: it sees one update at a time and keeps a state whose size depends on the model, not on the number
of sites. The supervisor feeds it in the order of the sites' names, so the result does not depend on who was first.

Adapters are dicts of float32 tensors, "<layer>.<module>.A" (r, d_in) and ".B" (d_out, r). The method's common factor
`scale` (alpha / rank) is left out of everything here: it is the same for all sites and multiplies the result.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from offsite.kernels.low_rank import Pair

Adapter = dict[str, Tensor]


@dataclass(frozen=True)
class Aggregate:
    """The outcome of a round.

    exact: what the plug-in uses. broadcast: per rank asked for, what sites of that rank start from next.
    residual: per rank, exact minus its broadcast; the owner keeps it.
    """

    exact: Adapter
    broadcast: dict[int, Adapter]
    residual: dict[int, Adapter]
    figures: dict[str, float] = field(default_factory=dict)


class Fold(Protocol):
    """One round's running sum."""

    def add(self, update: Adapter, *, weight: float) -> None:
        """Take one site's trained adapter; the weights of a round sum to one."""

    def finish(self, ranks: list[int]) -> Aggregate:
        """Close the round; `ranks` are those that sites may train at next."""


class Strategy(Protocol):
    """A family member: its settings are its fields."""

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]]  # aggregation kinds of the methods it can average
    mixed_ranks: ClassVar[bool]  # whether sites may train different ranks

    def begin(self, residual: dict[int, Adapter]) -> Fold:
        """Open a round on top of what the owner kept, per rank, from the last one."""


def pairs(adapter: Adapter) -> dict[str, Pair]:
    """Return {module: (B, A)} of an adapter."""
    return {key[:-2]: (adapter[key[:-2] + ".B"], adapter[key]) for key in sorted(adapter) if key.endswith(".A")}


def adapter(pairs_: dict[str, Pair]) -> Adapter:
    """Return the adapter that holds the given {module: (B, A)}."""
    return {
        f"{module}.{name}": factor for module, pair in pairs_.items() for name, factor in zip("BA", pair, strict=True)
    }
