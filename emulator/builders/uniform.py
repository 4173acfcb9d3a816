"""Offsite-Tuning (Xiao et al., arXiv 2302.04870): layers that do not train dropped at even distances."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import Batch
from offsite.emulator.builders.base import Stage, droppable, kept_of
from offsite.emulator.outline import Outline
from offsite.emulator.placements import Placement


@dataclass(frozen=True)
class Uniform:
    """Keeps `keep` layers in all: those the placement fixes, and of the rest evenly."""

    keep: int | None = None  # distinct layers in all; None: four fifths

    name: ClassVar[str] = "uniform"
    stage: ClassVar[Stage] = "depth"
    looks_at_text: ClassVar[bool] = False
    trains_on_text: ClassVar[bool] = False

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        """Decide by the layers' numbers alone; raises ValueError if they do not fit the depth."""
        depth = len(layers(model))
        keep, fixed = kept_of(depth, self.keep), placement.fixed(depth)
        inner = droppable(depth, keep=keep, fixed=fixed)
        kept = sorted({*fixed, *(inner[at] for at in even(len(inner), keep - len(fixed)))})
        return Outline(tuple(kept), placement.choose(kept, depth))


def even(n: int, k: int) -> list[int]:
    """Choose k of n indices, round(i (n-1)/(k-1)) with halves to the even one; a single one is the middle."""
    return [n // 2] if k == 1 else [round(i * (n - 1) / (k - 1)) for i in range(k)]
