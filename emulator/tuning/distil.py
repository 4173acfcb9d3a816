"""Distillation as in Offsite-Tuning (Xiao et al., arXiv 2302.04870): the student's hidden states follow the teacher's.

The teacher is the base. A stretch of tuned layers stands for a stretch of the base that was dropped or narrowed; where
it ends, what flows on must be what would have flowed on in the base.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Outline


class Border(NamedTuple):
    """The end of a tuned stretch: its last place in the student, and the teacher's layer whose output belongs there."""

    place: int
    layer: int


def borders(outline: Outline, tuned: Collection[int], depth: int) -> list[Border]:
    """Return where tuned stretches end: before a place with parameters that are not tuned, or at the end of the stack.

    A place in `outline.shared` has none of its own and belongs to the stretch around it. `depth` is the base's.
    """
    fixed = [place for place in outline.own if place not in tuned]
    inside = [place not in fixed for place in range(len(outline.layers))]
    ends = [Border(place - 1, outline.layers[place] - 1) for place in fixed if place and inside[place - 1]]
    return [*ends, Border(len(inside) - 1, depth - 1)] if inside[-1] else ends


def distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean of ((T - S) / rms(T))^2 over hidden states (b, t, d) where the mask (b, t) is not 0; a scalar, fp32."""
    taught, learned = teacher[mask.bool()].float(), student[mask.bool()].float()
    return (taught - learned).square().mean() / taught.square().mean()


def loss(
    teacher: nn.Module, ends: Sequence[Border], *, kd_weight: float, lm_weight: float
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return lm_weight * LM + kd_weight * KD: the loss of the text, and the mean distance over the borders."""
    taught_at, learned_at = [end.layer for end in ends], [end.place for end in ends]

    def of(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), outputs(teacher, taught_at) as taught:
            modality.run(teacher, batch, keep=batch.last)
        with outputs(student, learned_at) as learned:
            text = modality.loss(student, batch)
        apart = [distance(learned[end.place], taught[end.layer], batch.mask) for end in ends]
        return lm_weight * text + kd_weight * torch.stack(apart).mean()

    return of


@contextmanager
def outputs(model: nn.Module, at: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs (b, t, d) of these layers during a forward pass, by place."""
    states: dict[int, Tensor] = {}

    def keep(place: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            states[place] = output[0] if isinstance(output, tuple) else output

        return hook

    stack = layers(model)
    handles = [stack[place].register_forward_hook(keep(place)) for place in at]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
