"""Natural GaLore: Adam on gradients of low rank that are freed of what the last ones have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn, optim
from torch.optim.adamw import adamw

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's own


@dataclass(frozen=True)
class NaturalGalore:
    """Natural gradients in the subspace of GaLore (Das, arXiv 2410.16029; Zhao et al., arXiv 2403.03507).

    The gradient of a matrix is projected on its leading singular vectors: on both sides, which costs next to no memory
    and much of the gradient, or on the shorter one, as GaLore has it. What would keep no less than AdamW, and what is
    no matrix, trains by AdamW. Without a history it is GaLore, on the shorter side alone.
    """

    rank: int = 4
    every: int = 200  # steps between two choices of the subspace
    scale: float = 0.25  # of the steps in it
    history: int = 20  # gradients whose outer products are the curvature; 0: GaLore
    sides: Literal["least", "one"] = "least"  # those with which least is kept, or the shorter one
    damping: float = 1.0  # of the curvature, as a share of the mean squared norm of these gradients

    name: ClassVar[str] = "natural-galore"
    paper: ClassVar[str] = "arXiv 2410.16029"
    elementwise: ClassVar[bool] = False
    forward_only: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    aligned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.every < 1 or not 0 <= self.history <= 1000:
            raise ValueError(
                f"rank and every must be at least 1 and history in 0..1000, got {self.rank}, {self.every} and "
                f"{self.history}"
            )
        if not 0 < self.scale <= 100 or not 0 < self.damping <= 1e6:
            raise ValueError(
                f"scale must be above 0 and at most 100, and damping above 0 and at most 1e6, got {self.scale} and "
                f"{self.damping}"
            )

    def make(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        first_step: int,
    ) -> optim.Optimizer:
        """Return a fresh one, which draws nothing."""
        return LowRank(parameters, self, lr=learning_rate, weight_decay=weight_decay)


def natural(gradient: Tensor, history: Tensor, damping: float) -> Tensor:
    """Return (damping I + G G^T)^-1 g by Woodbury's identity, of a gradient g (k,) and a history G (k, s).

    What is factorised is s x s, in fp64 (arXiv 2410.16029, algorithm 1).
    """
    small = history.T.double() @ history.double()
    small.diagonal().add_(damping)
    along = torch.cholesky_solve((history.T @ gradient).double()[:, None], torch.linalg.cholesky(small))
    return (gradient - history @ along[:, 0].to(gradient.dtype)) / damping


class LowRank(optim.Optimizer):
    """What trains matrices by projected gradients; the state of each is what `sides` says."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], settings: NaturalGalore, *, lr: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        sides, state = self._sides(parameter), self.state[parameter]
        if not sides:
            _adamw(parameter, gradient, state, lr=group["lr"], weight_decay=group["weight_decay"])
            return
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if "step" not in state and not gradient.any():
            return  # it has no direction yet, as that of LoRA's A while B is zero
        anew = float(state.get("step", 0)) % self._settings.every == 0
        if anew:
            self._project_anew(gradient, state, sides)
        low = _down(gradient, state)
        if anew and len(sides) == 2:
            low = low.diagonal().diag()  # all else is rounding, of which Adam would make a whole step
        if self._settings.history:
            low = self._freed(low, state)
        move = torch.zeros_like(low)
        _adamw(move, low, state, lr=group["lr"], weight_decay=0.0)
        parameter.add_(_up(move, state), alpha=self._settings.scale)

    def _sides(self, parameter: Tensor) -> tuple[str, ...]:
        """Return on which sides the gradient is projected; on none: AdamW keeps less."""
        if parameter.ndim != 2:
            return ()
        (short, long), rank = sorted(parameter.shape), min(self._settings.rank, *parameter.shape)
        kept = 2 + self._settings.history
        one = ("left",) if parameter.shape[0] == short else ("right",)
        if self._settings.sides == "one" and rank < short:
            return one
        sizes: dict[tuple[str, ...], int] = {(): 2 * short * long, one: rank * (short + kept * long)}
        if self._settings.history:
            sizes[("left", "right")] = rank * (short + long + kept * rank)
        return min(sizes, key=lambda sides: sizes[sides])

    def _project_anew(self, gradient: Tensor, state: dict[str, Any], sides: tuple[str, ...]) -> None:
        """Choose the subspace by a gradient; the moments stay, as GaLore has it, and the history is of another one."""
        rank = self._settings.rank
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        for side in sides:
            state[side] = (left[:, :rank] if side == "left" else right[:rank].T).contiguous()
        state.pop("history", None)

    def _freed(self, low: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the natural gradient, of the length that the gradient has where there is no curvature."""
        flat = low.flatten()
        if "history" not in state:
            state["history"] = flat.new_zeros(len(flat), self._settings.history)
        history: Tensor = state["history"]
        history[:, int(state.get("step", 0)) % self._settings.history] = flat
        squares = history.square().sum(dim=0)
        damping = self._settings.damping * float(squares.sum()) / max(1, int((squares > 0).sum()))
        if damping <= 0:  # nothing but zeros
            return low
        return (natural(flat, history, damping) * damping).view_as(low)


def _down(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    if "left" in state:
        gradient = state["left"].T @ gradient
    return gradient @ state["right"] if "right" in state else gradient


def _up(low: Tensor, state: dict[str, Any]) -> Tensor:
    if "left" in state:
        low = state["left"] @ low
    return low @ state["right"].T if "right" in state else low


def _adamw(values: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, weight_decay: float) -> None:
    """Move values in place by torch's AdamW, whose moments are in a state."""
    if "exp_avg" not in state:
        state |= {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(values),
            "exp_avg_sq": torch.zeros_like(values),
        }
    adamw(
        [values],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        foreach=False,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=EPSILON,
        maximize=False,
    )
