"""How an adapter is trained: the rules of a site's steps, and of the owner's where figures compare with a site's."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from offsite.emulator import modality
from offsite.emulator.batches import Encoded, training_batches


class Rules(Protocol):
    """What a run says of its local training."""

    @property
    def steps(self) -> int:
        """Steps of a round."""

    @property
    def batch_size(self) -> int:
        """Sequences of a step."""

    @property
    def learning_rate(self) -> float:
        """The rate once warm."""

    @property
    def warmup_steps(self) -> int:
        """Steps until then."""

    @property
    def weight_decay(self) -> float:
        """Of all that trains."""

    @property
    def gradient_clipping(self) -> float:
        """Of the norm over all that trains."""

    @property
    def seed(self) -> int:
        """Of the order of the rows, and of dropout."""


def optimizer(parameters: Sequence[nn.Parameter], rules: Rules) -> AdamW:
    """Return a fresh AdamW (Loshchilov and Hutter, arXiv 1711.05101) with torch's default moments."""
    return AdamW(parameters, lr=rules.learning_rate, weight_decay=rules.weight_decay)


def warm_up(optimizer: Optimizer, rules: Rules, step: int) -> None:
    """Set the learning rate of a step of this round, from 0: linear over the warm-up, then constant."""
    share = min(1.0, (step + 1) / (rules.warmup_steps + 1))
    for group in optimizer.param_groups:
        group["lr"] = rules.learning_rate * share


def update(optimizer: Optimizer, parameters: Sequence[nn.Parameter], rules: Rules) -> None:
    """Take an optimiser step with the clipped gradients, and forget them."""
    clip_grad_norm_(parameters, rules.gradient_clipping)
    optimizer.step()
    optimizer.zero_grad()


def adapt(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    encoded: Sequence[Encoded],
    rules: Rules,
    *,
    tell: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train the adapter in a model as a site of one process does in a first round; the model is left in training mode.

    `tell` hears (steps done, steps, loss). Raises ValueError on a loss that is not finite.
    """
    trained = list(parameters.values())
    device = trained[0].device
    adamw = optimizer(trained, rules)
    batches = training_batches(encoded, batch_size=rules.batch_size, steps=rules.steps, first_step=0, seed=rules.seed)
    model.train()
    torch.manual_seed(rules.seed)  # of dropout
    for step, batch in enumerate(batches):
        warm_up(adamw, rules, step)
        loss = modality.loss(model, batch.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        update(adamw, trained, rules)
        told = float(loss.detach())
        if not math.isfinite(told):
            raise ValueError(f"the loss of step {step + 1} of {rules.steps} is {told}; a lower learning_rate may help")
        if tell:
            tell(step + 1, rules.steps, told)
