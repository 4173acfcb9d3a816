"""What every part promises.

A part is some groups of an adapter's schema, never a half of one: what is folded together trains together. Both ends
know it from the signed task alone, so that a site trains what the coordinator expects. What is outside of it is frozen
at the site and does not leave it. Nothing that is imported here loads a tensor library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from offsite.kernels.schema import Rule, Schema, groups

if TYPE_CHECKING:
    from torch import Tensor, nn

    from offsite.emulator.modality import Batch

Per = Literal["round", "site"]  # all sites of a round train the same part, or each has its own


class Turn(NamedTuple):
    """A site's round: what a part is drawn from beside the schema."""

    seed: int  # of the run's training
    round: int  # counted from 0, with the rounds of the runs that this one goes on from
    site: str

    def draw(self, per: Per) -> tuple[object, ...]:
        """Return what tells this draw from others."""
        return (self.seed, self.round, *([self.site] if per == "site" else []))


class Part(Protocol):
    """A family member; its fields are its settings."""

    name: ClassVar[str]
    partial: ClassVar[bool]  # whether some groups may be left out
    starts: ClassVar[bool]  # whether it is of what a version has that a run goes on from

    @property
    def alike(self) -> bool:
        """Whether all sites of a round train the same groups."""
        ...

    def fits(self, schema: Schema) -> None:
        """Raise ValueError if an adapter has too few groups to leave any out."""
        ...

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return the groups that train; `chosen` is what a site has chosen, where a part lets it choose (`Scoring`).

        Raises ValueError as `fits` does, and for a choice that no site can have made.
        """
        ...


@runtime_checkable
class Scoring(Protocol):
    """A part of which each site chooses by its own data, once a round, before the first step."""

    def scores(self, model: nn.Module, places: Mapping[int, int], batch: Batch, turn: Turn) -> Tensor:
        """Return one fp64 score for each trainable layer, in ascending order of the layers, on the model's device.

        `places` maps a place in the model to a layer of the base. The model stays as it is.
        """
        ...

    def choose(self, schema: Schema, turn: Turn, scores: Sequence[float]) -> tuple[int, ...]:
        """Return what is chosen by scores; processes that have the same ones choose the same."""
        ...

    def largest(self, schema: Schema) -> tuple[int, ...]:
        """Return the choice of the most bytes of a settled schema."""
        ...


@runtime_checkable
class Allotting(Protocol):
    """A part whose settings say what each site trains. A site is told its own: the others' say who else takes part."""

    sites: Mapping[str, int]  # those that settings name

    def settings_at(self, site: str) -> dict[str, Any]:
        """Return settings with which this site trains the same as with these."""
        ...


class Drawn:
    """What a part declares that is drawn from the task alone, once a round or for each site."""

    partial: ClassVar[bool] = True
    starts: ClassVar[bool] = False
    per: Per

    @property
    def alike(self) -> bool:
        """Whether it is drawn once a round."""
        return self.per == "round"


class Layers(NamedTuple):
    """The groups of a schema that train, by what they belong to."""

    own: dict[int, list[str]]  # absolute id of a layer -> its groups
    common: list[str]  # those of no layer, or of several


def by_layer(schema: Schema) -> Layers:
    """Return the groups that train by layer, both in ascending order; what is fixed trains nowhere."""
    own: dict[int, list[str]] = {}
    common: list[str] = []
    for group, keys in groups(schema).items():
        if all(schema[key].rule is Rule.FIXED for key in keys):
            continue
        layers = {key.partition(".")[0] for key in keys}
        layer = layers.pop()
        if layers or not layer.isdecimal():
            common.append(group)
        else:
            own.setdefault(int(layer), []).append(group)
    return Layers(dict(sorted(own.items())), common)


def units(schema: Schema, names: Sequence[str]) -> dict[str, list[str]]:
    """Return groups by what they train with, in their order: a map's tensors that no group is made of go together.

    Some of these do nothing without others, as the first matrix of a bottleneck while the second is zero.
    """
    alone = {_map(name) for name in names if name in schema}
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(_map(name) if _map(name) in alone else name, []).append(name)
    return together


def _map(group: str) -> str:
    layer, _, path = group.partition(".")
    return f"{layer}.{path.rpartition('.')[0] or path}"


def refuse_choice(part: Part, chosen: Sequence[int]) -> None:
    """Raise ValueError for a choice where a part leaves sites none."""
    if chosen:
        raise ValueError(f"part {part.name} leaves a site nothing to choose, and one chose {list(chosen)[:3]}")
