"""Which synthetic texts are of the task an adapter was tuned for.

Trans-LoRA trains a discriminator at whoever has the data. Here the adapter itself is what is left of that data: where
it changes nothing of what its base says, a text is of no task that it knows.

    gain(x) = (log p_tuned(x) - log p_base(x)) / tokens
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from offsite.emulator import modality
from offsite.emulator.modality import Sample, collate

R = TypeVar("R")


@torch.no_grad()
def gains(tuned: nn.Module, base: nn.Module, samples: Sequence[Sample], *, batch_size: int = 8) -> list[float]:
    """Return by sample how much likelier a target token is to the tuned model, in nats, on average."""
    scores: list[float] = []
    for model in (tuned, base):
        model.eval()
    for at in range(0, len(samples), batch_size):
        some = samples[at : at + batch_size]
        batch = collate(some).to(next(tuned.parameters()).device)
        ratios = modality.likelihoods(tuned, batch) - modality.likelihoods(base, batch)
        scores += [float(ratio) / collate([one]).targets for ratio, one in zip(ratios, some, strict=True)]
    return scores


def best(rows: Sequence[R], scores: Sequence[float], *, share: float) -> list[R]:
    """Return a share of rows, at least one, that have the highest scores, in their order; NaN is the lowest.

    Raises ValueError unless the share is in (0, 1].
    """
    check_share(share)
    count = max(1, round(share * len(rows)))
    ranked = sorted(range(len(rows)), key=lambda row: (-scores[row] if scores[row] == scores[row] else 1e300, row))
    return [rows[row] for row in sorted(ranked[:count])]


def check_share(share: float) -> None:
    """Raise ValueError for a share of texts that selects none, or more than there are."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
