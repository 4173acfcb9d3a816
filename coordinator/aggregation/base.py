"""What every strategy promises.

A strategy folds: it sees one update at a time and keeps a state whose size depends on the model, not on the number
of sites. It is fed in the order of the sites' names, so the result does not depend on who was first. What may be done
with a tensor is what its schema says; a factor that all sites have in common, such as LoRA's scale, is left out of
everything here, for it multiplies the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from offsite.kernels.schema import Rule, Schema, TensorMap, Tensors, Tier


@dataclass(frozen=True)
class Version:
    """What a run begins from, and what every round ends in."""

    adapter: Tensors  # what goes into the base
    broadcast: dict[Tier, Tensors]  # what the sites of each tier start from
    state: dict[str, Tensors] = field(default_factory=dict)  # what the owner keeps for later rounds, by its name
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where an update comes from; the weights of a round sum to one."""

    site: str
    tier: Tier
    weight: float


class Fold(Protocol):
    """One round's running sum."""

    def add(self, update: TensorMap, origin: Origin) -> None:
        """Take what a site's adapter has become; raises InputError if it cannot be folded with the others.

        A tensor is read, and unpacked with those of its group, when it is asked for: ask once, a group after the other.
        """

    def finish(self, tiers: Iterable[Tier]) -> Version:
        """Close the round; the tiers are those of the sites that may train next, and the last version has them."""


class Strategy(Protocol):
    """A family member: its settings are its fields."""

    name: ClassVar[str]
    rules: ClassVar[frozenset[Rule]]  # those it folds by
    mixed_tiers: ClassVar[bool]  # whether sites may train different sizes of what is open in a schema
    needs: ClassVar[Literal["updates", "sum"]]  # whether it must see each update, or their weighted sum is enough

    def begin(self, last: Version, schema: Schema) -> Fold:
        """Open a round on top of the last version."""
