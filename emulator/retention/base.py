"""What every retention promises. Loads no tensor library.

A run is a task, and one that goes on from another's version is the next task. What a site needs of earlier tasks beside
the broadcast is an anchor: tensors by the names that `parts` makes, the same in all rounds of a run. The owner makes it
once, of the version that the run goes on from and of what was remembered with it: a state by names, which travels with
versions and is `remember`ed anew when a run begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, runtime_checkable

from offsite.kernels.schema import Field, Rule, Schema, TensorMap, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from offsite.emulator.objectives import Objective

T = TypeVar("T")
State = Mapping[str, Tensors]  # what was remembered, by name
VALUES = frozenset({Rule.MEAN, Rule.PRODUCT, Rule.FIXED})  # of a method whose floats train each as a value
MOST_STRENGTH = 1e9


class Retention(Protocol):
    """A family member; its fields are its settings."""

    name: ClassVar[str]
    paper: ClassVar[str]  # where it is from, such as "arXiv 1612.00796"
    active: ClassVar[bool]  # whether it does anything
    starts: ClassVar[bool]  # whether it needs a version that the run goes on from
    asks: ClassVar[frozenset[str]]  # names of the state that this version has to have
    rules: ClassVar[frozenset[Rule]]  # of a method's tensors: those that it can hold to earlier ones
    needs: ClassVar[frozenset[Rule]]  # of these, what a method must have some of
    valued: ClassVar[bool]  # whether it holds values one by one, which have to mean the same in each round and task
    compares: ClassVar[bool]  # whether it goes with an objective that compares answers

    def remember(self, adapter: Tensors, schema: Schema, state: State) -> dict[str, Tensors]:
        """Return the state of a run that goes on from a version, of its adapter and state; raises ValueError."""
        ...

    def anchor(self, broadcast: Tensors, schema: Schema, state: State) -> Tensors:
        """Return what sites of a tier are sent beside their broadcast, of the run's state; raises ValueError."""
        ...

    def expects(self, schema: Schema) -> Schema:
        """Return what an anchor is made of, from a tier's settled schema; a size that it may choose is open."""
        ...


@runtime_checkable
class Penalising(Protocol):
    """A retention that adds a penalty on the values to what training lessens."""

    def penalty(self, values: TensorMap, anchor: TensorMap) -> Tensor:
        """Return the penalty, differentiable, of the live values that train, by the adapter's keys."""
        ...


@runtime_checkable
class Pulling(Protocol):
    """A retention that moves the values after each step of the optimiser."""

    @property
    def remains(self) -> float:
        """What is left of a step after the next one, as a share: a site counts its steps by it."""
        ...

    def pull(self, values: TensorMap, anchor: TensorMap) -> None:
        """Move the live values that train, in place."""
        ...


@runtime_checkable
class Recalling(Protocol):
    """A retention that keeps what an earlier adapter predicts of the rows."""

    def reference(self, anchor: Tensors) -> Tensors:
        """Return that adapter."""
        ...

    def recalled(self, objective: Objective) -> Objective:
        """Return an objective that does so beside another, once its samples were referred to that adapter."""
        ...


@runtime_checkable
class Rehearsing(Protocol):
    """A retention that trains on rows of earlier tasks."""

    @property
    def rows(self) -> int:
        """How many of a task a site keeps, at most."""
        ...

    def sample(self, rows: Iterable[T], *, seed: int) -> list[T]:
        """Return those of a task's rows that are kept: as likely these as any others."""
        ...

    def rehearsed(self, batch_size: int) -> int:
        """Return how many of a batch are rows of earlier tasks."""
        ...


class Anchored:
    """What a retention declares that holds values to those of earlier tasks."""

    active: ClassVar[bool] = True
    starts: ClassVar[bool] = True
    asks: ClassVar[frozenset[str]] = frozenset()
    rules: ClassVar[frozenset[Rule]] = VALUES
    needs: ClassVar[frozenset[Rule]] = frozenset()
    valued: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def remember(self, adapter: Tensors, schema: Schema, state: State) -> dict[str, Tensors]:
        """Keep the state as it is."""
        return dict(state)


class Unanchored:
    """What a retention declares that needs no tensors of earlier tasks."""

    starts: ClassVar[bool] = False
    asks: ClassVar[frozenset[str]] = frozenset()
    rules: ClassVar[frozenset[Rule]] = frozenset(Rule)
    needs: ClassVar[frozenset[Rule]] = frozenset()
    valued: ClassVar[bool] = False
    compares: ClassVar[bool] = True

    def remember(self, adapter: Tensors, schema: Schema, state: State) -> dict[str, Tensors]:
        """Keep the state as it is."""
        return dict(state)

    def anchor(self, broadcast: Tensors, schema: Schema, state: State) -> Tensors:
        """Return nothing."""
        return {}

    def expects(self, schema: Schema) -> Schema:
        """Expect nothing."""
        return {}


def check_strength(strength: float) -> None:
    """Raise ValueError for the weight of a penalty that is none; at 0 it changes nothing."""
    if not 0 <= strength <= MOST_STRENGTH:
        raise ValueError(f"strength must be at least 0 and at most {MOST_STRENGTH:g}, got {strength}")


def moving(schema: Schema) -> list[str]:
    """Return the keys of the values that train."""
    return [key for key, field in schema.items() if field.rule is not Rule.FIXED]


def named(part: str, tensors: TensorMap) -> Tensors:
    """Return tensors as a part of an anchor, such as "before.28.self_attn.q_proj.A"."""
    return {f"{part}.{key}": tensor for key, tensor in tensors.items()}


def fields(part: str, schema: Schema) -> Schema:
    """Return what a part of an anchor is made of that has a tensor for each value that trains."""
    return {f"{part}.{key}": Field("F32", schema[key].shape, Rule.FIXED) for key in moving(schema)}
