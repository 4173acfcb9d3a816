"""Offsite-Tuning (Xiao et al., arXiv 2302.04870): layers of the middle dropped at even distances."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from offsite.emulator.anatomy import layers
from offsite.emulator.batches import Batch
from offsite.emulator.builders.base import Outline, ends, kept_of, middle


@dataclass(frozen=True)
class Uniform:
    """Keeps `keep` layers in all: the lowest `bottom` and the highest `top`, which train, and of the rest evenly."""

    keep: int | None = None  # distinct layers in all, ends included; None: four fifths
    bottom: int = 2
    top: int = 2

    name: ClassVar[str] = "uniform"

    def outline(self, model: nn.Module, batches: Sequence[Batch]) -> Outline:
        """Decide by the layers' numbers alone; raises ValueError if they do not fit the depth."""
        depth = len(layers(model))
        keep = kept_of(depth, self.keep)
        inner = middle(depth, keep=keep, bottom=self.bottom, top=self.top)
        trainable = ends(depth, bottom=self.bottom, top=self.top)
        kept = [inner[at] for at in even(len(inner), keep - len(trainable))]
        return Outline(tuple(sorted({*trainable, *kept})), trainable)


def even(n: int, k: int) -> list[int]:
    """Choose k of n indices, round(i (n-1)/(k-1)) with halves to the even one; a single one is the middle."""
    return [n // 2] if k == 1 else [round(i * (n - 1) / (k - 1)) for i in range(k)]
