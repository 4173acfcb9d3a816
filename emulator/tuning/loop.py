"""Training at the model's owner: a few parameters of a model, on text, so that it can be killed and goes on."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import training_batches
from offsite.emulator.modality import Batch, Sample
from offsite.emulator.tuning.state import identity, resume, save


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. Weights decay only where they are matrices."""

    steps: int
    learning_rate: float
    batch_size: int = 4
    warmup_steps: int = 0
    decay: Literal["none", "cosine"] = "none"
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0  # of the norm over all parameters
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"steps and batch_size must be at least 1 and warmup_steps in 0..steps, got {self.steps}, "
                f"{self.batch_size} and {self.warmup_steps}"
            )
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.gradient_clipping <= 0:
            raise ValueError(
                f"learning_rate and gradient_clipping must be positive and weight_decay not negative, got "
                f"{self.learning_rate}, {self.gradient_clipping} and {self.weight_decay}"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay == "none":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


class Observer(Protocol):
    """Looks on while parameters are trained, and may end it early."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What it keeps: written with the state, and read back into these tensors."""

    def after(self, step: int) -> None:
        """Look at the parameters after a step, counted from 1."""

    def enough(self) -> bool:
        """Tell, before a step, whether training is to end."""


def tune(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Sample],
    schedule: Schedule,
    *,
    loss: Callable[[nn.Module, Batch], Tensor] = modality.loss,
    state: Path | None = None,
    every: int = 20,
    observer: Observer | None = None,
    tell: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train these fp32 parameters in place with AdamW, everything else frozen; return the loss of each step.

    There is no dropout, and the frozen weights' dtype is computed in. The file `state` is written after every `every`
    steps and at the end; called again on the same work, training goes on from it and ends with the bytes of an
    undisturbed run; it knows the schedule, the text and the start, but not the loss, and is its owner's to remove.
    `tell` hears (steps done, steps, loss). Raises ValueError on a loss that is not finite and a state of other work.
    """
    _free(model, parameters, samples)
    optimizer = _optimizer(parameters, schedule)
    work = identity(parameters, samples, asdict(schedule)) if state else ""
    kept = observer.tensors if observer else {}
    losses = resume(state, work, parameters, optimizer, kept) if state and state.exists() else []
    device = next(iter(parameters.values())).device
    training = model.training
    model.eval()
    try:
        for batch in _batches(samples, schedule, len(losses)):
            if observer and observer.enough():
                break
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(len(losses))
            with _precision(model, device):
                value = loss(model, batch.to(device))
            if not torch.isfinite(value):
                raise ValueError(
                    f"the loss of step {len(losses) + 1} of {schedule.steps} is {value.item()}; "
                    "a lower learning_rate may help"
                )
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), schedule.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(value.detach()))
            if observer:
                observer.after(len(losses))
            if state and (len(losses) % every == 0 or len(losses) == schedule.steps):
                save(state, work, parameters, optimizer, losses, kept)
            if tell:
                tell(len(losses), schedule.steps, losses[-1])
    finally:
        model.train(training)
    return losses


def trainable_copy(model: nn.Module, places: Sequence[int]) -> dict[str, nn.Parameter]:
    """Give the layers at these places fp32 parameters of their own, in place; everything else is frozen.

    The model's modules must be its own, as `stack.restack` returns them. Parameters that places share stay shared,
    also with places not named. Returns "<place>.<name in the layer>" -> parameter, each once.
    """
    model.requires_grad_(False)
    stack = layers(model)
    parameters: dict[str, nn.Parameter] = {}
    copies: dict[int, nn.Parameter] = {}
    for place in places:
        for name, parameter in stack[place].named_parameters():
            if id(parameter) not in copies:
                fresh = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                parameters[f"{place}.{name}"] = copies[id(parameter)] = fresh
    replaced = list(stack.parameters())  # alive until all are replaced, so that no id is used twice
    for module in stack.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in copies:
                setattr(module, leaf, copies[id(parameter)])
    del replaced
    return parameters


def _free(model: nn.Module, parameters: Mapping[str, nn.Parameter], samples: Sequence[Sample]) -> None:
    """Let these parameters train, and no other; raises ValueError if nothing can be trained."""
    if not parameters or not samples:
        raise ValueError("tuning needs parameters that train and text to train on")
    if other := next((name for name, p in parameters.items() if p.dtype != torch.float32), None):
        raise ValueError(f"{other} has the dtype {parameters[other].dtype}; what trains must be torch.float32")
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)


def _optimizer(parameters: Mapping[str, nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        fused=True,
    )


def _batches(samples: Sequence[Sample], schedule: Schedule, done: int) -> Iterator[Batch]:
    return training_batches(
        samples,
        batch_size=schedule.batch_size,
        steps=schedule.steps - done,
        first_step=done,
        seed=schedule.seed,
    )


def _precision(model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtype of the weights that are not fp32, if there are any."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            return torch.autocast(device.type, dtype=parameter.dtype)
    return nullcontext()
