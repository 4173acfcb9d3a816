"""SPSA-GC: the gradient is estimated from losses at random places, so that no graph is ever built."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn, optim

from offsite.emulator.seeds import generator


@dataclass(frozen=True)
class SpsaGc:
    """Simultaneous perturbation with gradient correction (BlackVIP, arXiv 2303.14773, eq. 3 and 4; Spall, 1992).

    Of k = 1, 2, ... the estimate is (l(p + c_k D) - l(p - c_k D)) / (2 c_k D), in which D is uniform on +-[0.5, 1], and
    c_k = perturbation / k^gamma. The step is p - a_k (g + momentum m), in which m is the sum of the estimates that
    decays by `momentum`, and a_k = rate / (k + offset)^alpha. The rate is not that of an adaptive optimiser.
    """

    draws: int = 5  # of D in a step: each takes two forward passes, and the mean of the estimates is taken
    perturbation: float = 0.01
    momentum: float = 0.9  # 0: SPSA without correction
    alpha: float = 0.4  # 0: the rate falls by its schedule alone
    gamma: float = 0.1
    offset: float = 1.0

    name: ClassVar[str] = "spsa-gc"
    paper: ClassVar[str] = "arXiv 2303.14773"
    elementwise: ClassVar[bool] = False
    forward_only: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False
    aligned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges; a gain that falls faster would make a round one of few steps."""
        if not 1 <= self.draws <= 64:
            raise ValueError(f"draws must be in 1..64, got {self.draws}")
        if not 1e-6 <= self.perturbation <= 1 or not 0 <= self.offset <= 1e6:
            raise ValueError(
                f"perturbation must be in 1e-6..1 and offset in 0..1e6, got {self.perturbation} and {self.offset}"
            )
        if not (0 <= self.momentum < 1 and 0 <= self.alpha <= 1 and 0 <= self.gamma <= 1):
            raise ValueError(
                f"momentum must be at least 0 and below 1, and alpha and gamma in 0..1, got {self.momentum}, "
                f"{self.alpha} and {self.gamma}"
            )

    def make(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        first_step: int,
    ) -> "Perturbation":
        """Return a fresh one; sites of one seed move along the same directions, and the mean of their steps is one."""
        return Perturbation(parameters, self, learning_rate, weight_decay, seed=seed, first_step=first_step)


class Perturbation(optim.Optimizer):
    """An `Estimator`: beside the parameters it keeps their momentum, and a copy of them while it estimates."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: SpsaGc,
        lr: float,
        weight_decay: float,
        *,
        seed: int,
        first_step: int,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._settings, self._seed, self._first_step = settings, seed, first_step

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def _steps(self) -> int:
        """How many were taken."""
        return int(self.state[self._parameters[0]].get("step", 0))

    def directions(self, draw: int) -> list[Tensor]:
        """Return D of a draw of the step at hand, a tensor for each parameter: the same whenever it is asked for."""
        random = generator(self._seed, f"direction {self._first_step + self._steps} {draw}")
        directions = []
        for parameter in self._parameters:
            ahead = torch.rand(parameter.shape, generator=random) * 2 - 1
            direction = torch.where(ahead < 0, -0.5, 0.5) + ahead / 2
            directions.append(direction.to(parameter.device))
        return directions

    @torch.no_grad()
    def estimate(self, loss: Callable[[], float]) -> float:
        """See `base.Estimator`; both losses of a draw have the same dropout."""
        settings, parameters = self._settings, self._parameters
        size = settings.perturbation / (self._steps + 1) ** settings.gamma
        places = [parameter.detach().clone() for parameter in parameters]
        gradients = [torch.zeros_like(place) for place in places]
        devices = [place.device for place in places[:1] if place.device.type == "cuda"]
        losses: list[float] = []
        try:
            for draw in range(settings.draws):
                directions = self.directions(draw)
                with torch.random.fork_rng(devices):
                    ahead = _moved(parameters, places, directions, size, loss)
                behind = _moved(parameters, places, directions, -size, loss)
                slope = (ahead - behind) / (2 * size * settings.draws)
                for gradient, direction in zip(gradients, directions, strict=True):
                    gradient.add_(direction.reciprocal_(), alpha=slope)
                losses += [ahead, behind]
        finally:
            for parameter, place in zip(parameters, places, strict=True):
                parameter.copy_(place)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return sum(losses) / len(losses)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step with the estimates that are there."""
        settings, number = self._settings, self._steps + 1
        for group in self.param_groups:
            gain = group["lr"] / (number + settings.offset) ** settings.alpha
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(parameter)}
                state["step"] += 1
                state["momentum"].mul_(settings.momentum).add_(parameter.grad)
                parameter.mul_(1 - gain * group["weight_decay"])
                parameter.add_(parameter.grad + settings.momentum * state["momentum"], alpha=-gain)


def _moved(
    parameters: Sequence[nn.Parameter],
    places: Sequence[Tensor],
    directions: Sequence[Tensor],
    size: float,
    loss: Callable[[], float],
) -> float:
    """Return the loss at parameters that are moved from their places along directions."""
    for parameter, place, direction in zip(parameters, places, directions, strict=True):
        parameter.copy_(place).add_(direction, alpha=size)
    return loss()
