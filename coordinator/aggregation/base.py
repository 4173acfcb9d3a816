"""What every strategy promises.

A strategy folds: it sees one update at a time and keeps a state whose size depends on the model, not on the number
of sites. It is fed in the order of the sites' names, so the result does not depend on who was first. What may be done
with a tensor is what its schema says; a factor that all sites have in common, such as LoRA's scale, is left out of
everything here, for it multiplies the result.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

from offsite.kernels.schema import Rule, Schema, TensorMap, Tensors, Tier

Sums = dict[str, dict[str, float]]  # by name and group: what figures are made of
MEMORY = "memory."  # so the names of a state begin that memories keep; see `memory.base`
RETENTION = "retention."  # so the names of a state begin that sites are held to; see `emulator.retention`
KEPT = (MEMORY, RETENTION)  # so those of all that others keep, which strategies are not given


@dataclass(frozen=True)
class Version:
    """What a run begins from, and what every round ends in."""

    adapter: Tensors  # what goes into the base
    broadcast: dict[Tier, Tensors]  # what the sites of each tier start from
    state: dict[str, Tensors] = field(default_factory=dict)  # what the owner keeps for later rounds, by its name
    figures: dict[str, float] = field(default_factory=dict)
    sums: Sums = field(default_factory=dict)  # of a part of the groups, from which the figures of all can be told


@dataclass(frozen=True)
class Origin:
    """Where an update comes from; the weights of a round sum to one.

    That of a broadcast may be below zero, where a strategy is linear: what a late update began from is taken off.
    """

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


@runtime_checkable
class Together(Protocol):
    """A fold that takes several updates at once, so that what it keeps is gone through once for all of them."""

    def add_together(self, updates: Sequence[tuple[TensorMap, Origin]]) -> None:
        """Take updates in their order: the bytes are those of `add` for one after the other."""


class Strategy(Protocol):
    """A family member: its settings are its fields."""

    name: ClassVar[str]
    rules: ClassVar[frozenset[Rule]]  # those it folds by
    exact: ClassVar[frozenset[Rule]]  # of them those whose mean it makes as they say, not one near it
    linear: ClassVar[bool]  # whether it sums updates times weights, of any sign: so late ones can be folded, as changes
    mixed_tiers: ClassVar[bool]  # whether sites may train different sizes of what is open in a schema
    needs: ClassVar[Literal["updates", "sum"]]  # whether it must see each update, or their weighted sum is enough

    def begin(self, last: Version, schema: Schema) -> Fold:
        """Open a round on top of the last version."""


@runtime_checkable
class Separable(Protocol):
    """A strategy that folds each group of a schema by itself, so that several machines can fold some groups each.

    Updates may lack groups, and the tensors of a state have the keys of those that they are kept of: what is kept of a
    group that nobody trained stays as it is.
    """

    def join(self, parts: Sequence[Version]) -> Version:
        """Return the version of all groups; the bytes are those of one fold of them all."""


def joined(parts: Sequence[Version]) -> Version:
    """Put the groups of several versions together, in an order that does not depend on who folded which; no figures."""
    sums: Sums = {}
    for part in parts:
        for name, values in part.sums.items():
            sums[name] = dict(sorted({**sums.get(name, {}), **values}.items()))
    adapter = {key: tensor for part in parts for key, tensor in part.adapter.items()}
    alike = {tier for tier in parts[0].broadcast if all(part.broadcast.get(tier) is part.adapter for part in parts)}
    return Version(
        adapter=adapter,
        broadcast=_united([part.broadcast for part in parts]) | dict.fromkeys(alike, adapter),
        state=_united([part.state for part in parts]),
        sums=sums,
    )


def _united(parts: Sequence[dict[str, Tensors]]) -> dict[str, Tensors]:
    names = sorted({name for part in parts for name in part})
    return {name: {key: one for part in parts for key, one in part.get(name, {}).items()} for name in names}
