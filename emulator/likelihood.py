"""How well a model predicts a text. Training and evaluation compute the same loss."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.batches import IGNORED, Batch


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of predicted tokens: their sum in nats, and their number."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where the mean is too large for a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def __add__(self, other: "Likelihood") -> "Likelihood":
        """Join the likelihoods of two texts."""
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood per target token, in nats; differentiable. The batch is on the model's device."""
    return _nll(model, batch, reduction="mean")


def _nll(model: nn.Module, batch: Batch, *, reduction: str) -> Tensor:
    """Ask the model's own forward pass, as wrappers need, for logits only where some row has a target."""
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    if not len(columns):
        raise ValueError("the batch has no token to predict")
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=columns, use_cache=False
    ).logits
    rows = logits.flatten(0, 1).float()
    return functional.cross_entropy(rows, targets[:, columns].flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.no_grad()
def likelihood(model: nn.Module, batches: Iterable[Batch]) -> Likelihood:
    """Likelihood of the targets of all batches, without dropout; raises ValueError if there is no batch."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        total = Likelihood(0.0, 0)
        for batch in batches:
            total += Likelihood(float(_nll(model, batch.to(device), reduction="sum")), batch.targets)
    finally:
        model.train(training)
    if not total.tokens:
        raise ValueError("there is no token to predict: no batch was given")
    return total
