"""Learning without forgetting: what the version predicted that a run goes on from is learned beside the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from offsite.emulator.retention.base import Anchored, State, check_strength, named
from offsite.kernels.schema import Rule, Schema, Tensors

if TYPE_CHECKING:
    from offsite.emulator.objectives import Objective

BEFORE = "before"


@dataclass(frozen=True)
class Distil(Anchored):
    """Add strength * T^2 KL(p_before || p) at temperature T, the mean over the targets (LwF, arXiv 1606.09282).

    The version's predictions on the site's own rows are computed once a round, before the first step. Of each target
    the `k` likeliest tokens are kept, and all others are one outcome: a bound of the divergence from below, which is
    zero where the whole is. A step takes a second pass.
    """

    strength: float = 1.0
    temperature: float = 2.0
    k: int = 32

    name: ClassVar[str] = "distil"
    paper: ClassVar[str] = "arXiv 1606.09282"
    rules: ClassVar[frozenset[Rule]] = frozenset(Rule)
    valued: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_strength(self.strength)
        if not 0.1 <= self.temperature <= 100 or not 1 <= self.k <= 4096:
            raise ValueError(f"temperature must be in 0.1..100 and k in 1..4096, got {self.temperature} and {self.k}")

    def anchor(self, broadcast: Tensors, schema: Schema, state: State) -> Tensors:
        """Return the adapter that the run goes on from."""
        return named(BEFORE, broadcast)

    def expects(self, schema: Schema) -> Schema:
        """Expect the whole adapter."""
        return {f"{BEFORE}.{key}": field for key, field in schema.items()}

    def reference(self, anchor: Tensors) -> Tensors:
        """See `base.Recalling`."""
        return {name.removeprefix(f"{BEFORE}."): tensor for name, tensor in anchor.items()}

    def recalled(self, objective: Objective) -> Objective:
        """See `base.Recalling`."""
        from offsite.emulator.retention.recall import Recall

        return Recall(objective, self.strength, self.temperature, self.k) if self.strength else objective
