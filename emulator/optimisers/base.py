"""What an optimiser offers. One is made anew for each round, and all that it keeps is in its `state`, as tensors."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn, optim


class Optimiser(Protocol):
    """A way of the steps; its fields are its settings."""

    name: ClassVar[str]
    paper: ClassVar[str]  # where it is from, such as "arXiv 1711.05101"
    elementwise: ClassVar[bool]  # whether it moves each value by that value's own gradients: any part of them will do
    forward_only: ClassVar[bool]  # whether it asks for losses and never for a gradient; what it makes is an `Estimator`
    scale_free: ClassVar[bool]  # whether a step is as long as the rate says, so that the rates of methods suit it
    aligned: ClassVar[
        bool
    ]  # whether sites move along the same directions, for which they have to train the same values

    def make(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        first_step: int,
    ) -> optim.Optimizer:
        """Return what takes the steps of a round.

        Args:
            parameters: what trains, fp32.
            learning_rate: the highest; before each step the groups' `lr` is set to that step's.
            weight_decay: decoupled from the gradient, as a share of the rate.
            seed: of what is drawn, the same in all processes.
            first_step: steps of earlier rounds, so that each round draws otherwise.
        """
        ...


@runtime_checkable
class Estimator(Protocol):
    """An optimiser of order zero: it estimates the gradient from losses, which are computed without a graph."""

    def estimate(self, loss: Callable[[], float]) -> float:
        """Leave an estimate of the gradient in the parameters' `grad`; return the mean of the losses it asked for.

        The parameters are moved in place before each call of `loss`, and have their own bits again at the end.
        """
        ...
