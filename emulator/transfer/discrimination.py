"""Which synthetic texts are of the task an adapter was tuned for.

Trans-LoRA trains a discriminator at whoever has the data. Here the adapter itself is what is left of that data: where
it changes nothing of what its base says, a text is of no task that it knows.

    gain(x) = (log p_tuned(x) - log p_base(x)) / tokens

Where sites have measured what their rows are like, by a method that tells rows by themselves, real texts are told from
synthetic ones as in the paper, by what is nearer: the sums that sites have measured, or those of all synthetic texts.

    score(x) = likeness(x, real) - likeness(x, synthetic)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from offsite.emulator import modality
from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter
from offsite.emulator.modality import Sample, collate
from offsite.emulator.routing import Telling

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


def read(directory: Path) -> tuple[Telling, Adapter]:
    """Read what a run has published that measured rows; raises ValueError unless rows can be told by that alone."""
    method, sums = own_format.read(directory)
    if not isinstance(method, Telling) or method.asks_model:
        raise ValueError(
            f"{directory}: it is of the method {method.name}, by which no text is told from another without the model "
            "that sites had; name the folder adapter/ of a run that counted words"
        )
    return method, sums


def realness(method: Telling, sums: Adapter, samples: Sequence[Sample], *, batch_size: int = 8) -> list[float]:
    """Return by sample how much more like the measured rows it is than like all of the samples, in -2 .. 2.

    Raises ValueError if the sums are none of the method's.
    """
    batches = [collate(samples[at : at + batch_size]) for at in range(0, len(samples), batch_size)]
    rows = [method.rows(nn.Identity(), {}, batch) for batch in batches]
    synthetic = {key: sum((one[key.rpartition(".")[2]].sum(dim=0) for one in rows), torch.zeros(())) for key in sums}
    alike = torch.cat([method.likeness(one, {"real": sums, "synthetic": synthetic}) for one in rows])
    scores: list[float] = (alike[:, 0] - alike[:, 1]).tolist()
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
