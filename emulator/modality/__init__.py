"""Modalities: how a kind of data is read, put into batches and run through a model, and how well a model predicts it.

A sample and a batch say of which modality they are, so whoever trains or measures a model need not know. Loads no
tensor library, as data is read where there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.emulator import catalogue
from offsite.emulator.examples import Example, collect
from offsite.emulator.modality.base import (
    Batch,
    Encoding,
    Likelihoods,
    Modality,
    Packs,
    Piece,
    Predictions,
    Sample,
    Score,
    Words,
)
from offsite.kernels.plugins import Plugins

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

MODALITIES: Plugins[Modality] = catalogue.MODALITIES

__all__ = [
    "MODALITIES",
    "Batch",
    "Encoding",
    "Modality",
    "Piece",
    "Sample",
    "Score",
    "collate",
    "default",
    "disturb",
    "encode",
    "likelihoods",
    "loss",
    "packs",
    "pieces",
    "predictions",
    "read",
    "run",
    "score",
    "words",
]


def default() -> Modality:
    """Return the modality of every run: bases are causal language models, as `checkpoint.skeleton` makes them."""
    return _made(catalogue.MODALITY)


def read(path: Path, *, folders: Sequence[Path] = ()) -> list[Example]:
    """Read a file or a folder of a run's examples, and leave out no row; raises ValueError as `collect` does."""
    return collect(path, default(), folders=folders, odd_rows="refuse").examples


def encode(examples: Sequence[Any], tokenizer: Any, *, max_length: int, divide: bool = True) -> list[Any]:
    """Return the samples of a run's examples, of which none may be odd; warnings are logged. Raises ValueError."""
    encoding = default().encode(examples, tokenizer, max_length=max_length, divide=divide, odd_rows="refuse")
    for warning in encoding.warnings:
        log.warning(warning)
    return encoding.samples


def collate(samples: Sequence[Sample]) -> Batch:
    """Make a batch of samples, padded to the longest of them."""
    return _of(samples[0]).collate(samples)


def disturb(model: nn.Module, batch: Batch) -> tuple[Batch, Tensor]:
    """Return a batch with every other position replaced, and a mask (b, t) of those between, on the CPU."""
    return _of(batch).disturb(model, batch)


def run(model: nn.Module, batch: Batch, *, keep: Tensor | None = None) -> Tensor:
    """Run a batch, on the model's device, through the model's own forward pass; return its outputs.

    Of outputs at many positions only those that `keep` indexes are computed, if it is given.
    """
    return _of(batch).run(model, batch, keep=keep)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return what training lessens, the mean over the batch's targets; differentiable. The batch is on the device."""
    return _of(batch).loss(model, batch)


def likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Return (b,) log-likelihoods of the samples' targets, in nats, differentiable; the batch is on the device.

    Raises ValueError where the modality does not say how likely a sample is.
    """
    kind = _of(batch)
    if not isinstance(kind, Likelihoods):
        raise ValueError(f"the modality {kind.name} does not say how likely a sample is, so that none are compared")
    return kind.likelihoods(model, batch)


def packs(model: nn.Module) -> bool:
    """Tell whether a model predicts of a packed batch of a run's what it does of one that is not."""
    kind = default()
    return isinstance(kind, Packs) and kind.packs(model)


def words(batch: Batch) -> list[tuple[int, ...]]:
    """Return the token ids of each sample that it does not learn, as of a prompt; all of one that learns all.

    Raises ValueError where the modality's samples are no sequences of tokens.
    """
    return _worded(batch).words(batch)


def pieces(batch: Batch) -> list[list[Piece]]:
    """Return each sample's token ids in pieces, and whether they are learned; raises ValueError as `words`."""
    return _worded(batch).pieces(batch)


def _worded(batch: Batch) -> Words:
    kind = _of(batch)
    if not isinstance(kind, Words):
        raise ValueError(f"the modality {kind.name} has no words, so that none are counted or shown")
    return kind


def predictions(model: nn.Module, batch: Batch) -> Tensor:
    """Return (n, v) logits of the batch's targets, differentiable; the batch is on the device.

    Raises ValueError where the modality's targets are no outcomes of one kind.
    """
    kind = _of(batch)
    if not isinstance(kind, Predictions):
        raise ValueError(f"the modality {kind.name} predicts no outcomes of one kind, so that none are recalled")
    return kind.predictions(model, batch)


def score(model: nn.Module, batches: Iterable[Batch]) -> Score:
    """Return the score of all batches together, without dropout; raises ValueError if there is no batch."""
    import torch

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total: Score | None = None
    try:
        with torch.no_grad():
            for batch in batches:
                one = _of(batch).score(model, batch.to(device))
                total = one if total is None else total + one
    finally:
        model.train(training)
    if total is None or not total.count:
        raise ValueError("there is nothing to predict: no batch was given")
    return total


def _of(one: Sample | Batch) -> Modality:
    return _made(one.modality)


@cache
def _made(name: str) -> Modality:
    return MODALITIES.make(name, {})
