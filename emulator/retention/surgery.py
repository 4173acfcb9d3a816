"""Model surgery: the adapter that trains is pulled to the mean of those of earlier tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.retention.base import Anchored, State, fields, moving, named
from offsite.kernels.schema import Schema, TensorMap, Tensors

MEAN, TASKS = "mean", "tasks"  # names of the state: the mean by the adapter's keys, and of how many tasks it is
MOST_ALPHA = 0.5


@dataclass(frozen=True)
class Surgery(Anchored):
    """After each step theta becomes (1 - alpha) theta + alpha mean_k theta_k, over earlier tasks k (MOS, AAAI 2025).

    Sun et al., arXiv 2412.09441; once a step and for all layers together, and evaluation changes nothing. Each
    task begins from the adapter of the last one, as in the paper. With a large alpha only the last steps of a round
    would count, so that it is bounded, and sites count steps by what is left of them.
    """

    alpha: float = 0.1

    name: ClassVar[str] = "surgery"
    paper: ClassVar[str] = "arXiv 2412.09441"

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.alpha <= MOST_ALPHA:
            raise ValueError(f"alpha must be at least 0 and at most {MOST_ALPHA:g}, got {self.alpha}")

    @property
    def remains(self) -> float:
        """See `base.Pulling`."""
        return 1 - self.alpha

    def remember(self, adapter: Tensors, schema: Schema, state: State) -> dict[str, Tensors]:
        """Take the adapter of the task that is over into the mean."""
        import torch

        tasks = state[TASKS][TASKS] + 1 if TASKS in state else torch.ones(1)
        known = state.get(MEAN, {})
        mean = {
            key: known[key] + (adapter[key] - known[key]) / tasks if key in known else adapter[key]
            for key in moving(schema)
        }
        return {**state, MEAN: mean, TASKS: {TASKS: tasks}}

    def anchor(self, broadcast: Tensors, schema: Schema, state: State) -> Tensors:
        """Return the mean."""
        return named(MEAN, {key: state[MEAN][key] for key in moving(schema)})

    def expects(self, schema: Schema) -> Schema:
        """Expect the mean of each value."""
        return fields(MEAN, schema)

    def pull(self, values: TensorMap, anchor: TensorMap) -> None:
        """See `base.Pulling`."""
        import torch

        with torch.no_grad():
            for key, value in values.items():
                value.lerp_(anchor[f"{MEAN}.{key}"], self.alpha)
