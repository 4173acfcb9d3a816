"""Elastic weight consolidation: what mattered to earlier tasks is hard to move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from offsite.emulator.retention.base import Anchored, State, check_strength, fields, moving, named
from offsite.kernels.schema import Schema, TensorMap, Tensors

if TYPE_CHECKING:
    from torch import Tensor

FISHER = "fisher"  # the name of the state: by the adapter's keys, what `methods.fisher` has measured


@dataclass(frozen=True)
class Ewc(Anchored):
    """Add strength / 2 * sum F (theta - before)^2 (Kirkpatrick et al., arXiv 1612.00796, eq. 3).

    `before` is the adapter that the run goes on from, and F the Fisher information of its values on the tasks so far,
    for each target: one of these counts `strength` times as much as one of the task at hand. Of low-rank adapters both
    are of the factors' own values. Of several tasks there is one penalty, at the newest adapter, and their F add up, as
    in online EWC (Schwarz et al., arXiv 1805.06370), where the run that measures lets the earlier ones decay.
    """

    strength: float = 1.0

    name: ClassVar[str] = "ewc"
    paper: ClassVar[str] = "arXiv 1612.00796"
    asks: ClassVar[frozenset[str]] = frozenset({FISHER})

    def __post_init__(self) -> None:
        """Check the range."""
        check_strength(self.strength)

    def anchor(self, broadcast: Tensors, schema: Schema, state: State) -> Tensors:
        """Return where the values were, and how much each of them matters."""
        fisher, keys = state[FISHER], moving(schema)
        if missing := [key for key in keys if key not in fisher or fisher[key].shape != broadcast[key].shape]:
            raise ValueError(
                f"the Fisher information is not of {missing[0]} {tuple(broadcast[missing[0]].shape)}, which trains; "
                "measure it of the same layers and method, in a run that goes on from the version"
            )
        return named("before", {key: broadcast[key] for key in keys}) | named(
            "fisher", {key: fisher[key] for key in keys}
        )

    def expects(self, schema: Schema) -> Schema:
        """Expect both of each value."""
        return fields("before", schema) | fields("fisher", schema)

    def penalty(self, values: TensorMap, anchor: TensorMap) -> Tensor:
        """See `base.Penalising`; where F is negative, which no sum of squares is, there is none."""
        import torch

        terms = [
            (anchor[f"fisher.{key}"].clamp(min=0) * (value - anchor[f"before.{key}"]).square()).sum()
            for key, value in values.items()
        ]
        return self.strength / 2 * torch.stack(terms).sum()
