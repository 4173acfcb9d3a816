"""Modalities: how batches of a kind of data are run through a model, and how well a model predicts them.

A batch says of which modality it is, so whoever trains or measures a model need not know.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from offsite.emulator import catalogue
from offsite.emulator.modality.base import Inputs, Modality, Score
from offsite.kernels.plugins import Plugins

MODALITIES: Plugins[Modality] = catalogue.MODALITIES

__all__ = ["MODALITIES", "Inputs", "Modality", "Score", "loss", "run", "score"]


def run(model: nn.Module, batch: Inputs, *, keep: Tensor | None = None) -> Tensor:
    """Run a batch, on the model's device, through the model's own forward pass; return its outputs.

    Of outputs at many positions only those that `keep` indexes are computed, if it is given.
    """
    return _of(batch).run(model, batch, keep=keep)


def loss(model: nn.Module, batch: Inputs) -> Tensor:
    """Return what training lessens, the mean over the batch's targets; differentiable. The batch is on the device."""
    return _of(batch).loss(model, batch)


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Inputs]) -> Score:
    """Return the score of all batches together, without dropout; raises ValueError if there is no batch."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total: Score | None = None
    try:
        for batch in batches:
            one = _of(batch).score(model, batch.to(device))
            total = one if total is None else total + one
    finally:
        model.train(training)
    if total is None or not total.count:
        raise ValueError("there is nothing to predict: no batch was given")
    return total


def _of(batch: Inputs) -> Modality:
    return _made(batch.modality)


@cache
def _made(name: str) -> Modality:
    return MODALITIES.make(name, {})
