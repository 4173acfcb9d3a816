"""How the learning rate goes over steps: schedules, by the names that transformers has for them.

The curves are transformers' own, without the steps in which they are zero, for those would train nothing. Step s of n,
counted from 0, with w steps to warm up, is its step s + 1 of n + 1 with w + 1 to warm up. So a warm-up rises as
(s + 1) / (w + 1) and ends before step w, the first with the whole rate, and what would reach its end in step n is near
it in step n - 1, the last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from offsite.emulator import catalogue
from offsite.kernels.plugins import Plugins

Curve = Callable[[int], float]  # step, from 0 -> its share of the learning rate: above 0, at most 1


class Schedule(Protocol):
    """A way of the learning rate; its fields are its settings."""

    name: ClassVar[str]

    def fits(self, steps: int, warmup_steps: int) -> None:
        """Raise ValueError if it needs more steps than there are."""
        ...

    def curve(self, steps: int, warmup_steps: int) -> Curve:
        """Return which share of the learning rate each of so many steps has."""
        ...


@dataclass(frozen=True)
class Constant:
    """The whole rate, once warm."""

    name: ClassVar[str] = "constant"

    def fits(self, steps: int, warmup_steps: int) -> None:
        """Any number will do."""

    def curve(self, steps: int, warmup_steps: int) -> Curve:
        """Return the warm-up and ones."""
        return _curve("constant_with_warmup", steps, warmup_steps, {})


class Falling:
    """A rate that falls once it is warm."""

    name: ClassVar[str]

    def fits(self, steps: int, warmup_steps: int) -> None:
        """Raise ValueError if the steps are over before it is warm."""
        if warmup_steps >= steps:
            raise ValueError(
                f"the schedule {self.name} falls after the warm-up, and warmup_steps is {warmup_steps} of {steps} "
                f"steps; give fewer than {steps}, or the schedule {Constant.name}"
            )

    def curve(self, steps: int, warmup_steps: int) -> Curve:
        """Return the warm-up and what follows it."""
        return _curve(self.name, steps, warmup_steps, self._arguments(steps, warmup_steps))

    def _arguments(self, steps: int, warmup_steps: int) -> Mapping[str, Any]:
        """Return transformers' own arguments of this schedule, for a rate of 1."""
        return {}


@dataclass(frozen=True)
class Linear(Falling):
    """In a line to zero."""

    name: ClassVar[str] = "linear"


@dataclass(frozen=True)
class Cosine(Falling):
    """Along half a wave to zero (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""

    name: ClassVar[str] = "cosine"


@dataclass(frozen=True)
class CosineWithFloor(Falling):
    """Along half a wave to a share of the rate."""

    floor: float = 0.1

    name: ClassVar[str] = "cosine_with_min_lr"

    def __post_init__(self) -> None:
        """Check the range."""
        _check_floor(self.floor)

    def _arguments(self, steps: int, warmup_steps: int) -> Mapping[str, Any]:
        return {"min_lr_rate": self.floor}


@dataclass(frozen=True)
class Polynomial(Falling):
    """As the power of a line to a share of the rate."""

    power: float = 2.0
    floor: float = 0.0

    name: ClassVar[str] = "polynomial"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.power <= 0:
            raise ValueError(f"power must be above 0, got {self.power}")
        _check_floor(self.floor)

    def _arguments(self, steps: int, warmup_steps: int) -> Mapping[str, Any]:
        return {"power": self.power, "lr_end": self.floor}


@dataclass(frozen=True)
class InverseSqrt(Falling):
    """As 1 / sqrt(1 + k / timescale), k steps after the warm-up (Zhai et al., arXiv 2106.04560)."""

    timescale: int | None = None  # steps; None: one more than those of the warm-up (Vaswani et al., arXiv 1706.03762)

    name: ClassVar[str] = "inverse_sqrt"

    def __post_init__(self) -> None:
        """Check the range."""
        if self.timescale is not None and self.timescale < 1:
            raise ValueError(f"timescale must be at least 1, got {self.timescale}")

    def _arguments(self, steps: int, warmup_steps: int) -> Mapping[str, Any]:
        return {"timescale": self.timescale}


@dataclass(frozen=True)
class WarmupStableDecay(Falling):
    """The whole rate until the last steps, in which it falls to zero (MiniCPM, arXiv 2404.06395)."""

    decay: float = 0.2  # share of the steps after the warm-up in which it falls, one at least
    shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"  # the best of Haegele et al., arXiv 2405.18392

    name: ClassVar[str] = "warmup_stable_decay"

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")

    def _arguments(self, steps: int, warmup_steps: int) -> Mapping[str, Any]:
        left = steps - warmup_steps  # of them the first has the whole rate, as the first of the decay has there
        falling = min(left - 1, max(1, round(self.decay * left)))
        return {"num_decay_steps": falling + 1, "decay_type": self.shape}


def _check_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise ValueError(f"floor is a share of the learning rate, at least 0 and less than 1, got {floor}")


def _curve(name: str, steps: int, warmup_steps: int, arguments: Mapping[str, Any]) -> Curve:
    """Return a curve of transformers', one step ahead of it; its schedulers want an optimiser, here one of rate 1."""
    from torch import empty
    from torch.optim import SGD
    from transformers.optimization import get_scheduler

    scheduler = get_scheduler(
        name,
        SGD([empty(0, requires_grad=True)], lr=1.0),
        num_warmup_steps=warmup_steps + 1,
        num_training_steps=steps + 1,
        scheduler_specific_kwargs=dict(arguments),
    )
    (share,) = scheduler.lr_lambdas
    return lambda step: float(share(step + 1))


SCHEDULES: Plugins[Schedule] = catalogue.SCHEDULES
make = SCHEDULES.make
