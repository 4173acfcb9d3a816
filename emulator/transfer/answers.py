"""Learning what another model answers: all of its distribution where both have one vocabulary, else its words."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator import modality
from offsite.emulator.modality import Batch


def same_words(one: Any, other: Any) -> bool:
    """Tell whether two tokenizers give the same numbers to the same words."""
    return bool(one.get_vocab() == other.get_vocab())


def divergence(teacher: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """Return KL(teacher || student) in nats, the mean over a batch's targets (Hinton et al., arXiv 1503.02531)."""

    def of(student: nn.Module, batch: Batch) -> Tensor:
        targets: Tensor = batch.tensors["labels"][:, 1:] >= 0
        columns = targets.any(dim=0).nonzero().squeeze(1)
        with torch.no_grad():
            said = _log_probabilities(modality.run(teacher, batch, keep=columns))
        learned = _log_probabilities(modality.run(student, batch, keep=columns))
        apart = functional.kl_div(learned, said, reduction="none", log_target=True).sum(-1)
        return apart[targets[:, columns]].mean()

    return of


def _log_probabilities(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits.float(), dim=-1)
