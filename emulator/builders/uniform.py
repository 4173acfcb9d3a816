"""Offsite-Tuning (Xiao et al., arXiv 2302.04870): layers that do not train dropped at even distances."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders.base import Stage, evenly, kept_of
from offsite.emulator.modality import Batch
from offsite.emulator.outline import REDUCTION, Outline
from offsite.emulator.placements import Placement


@dataclass(frozen=True)
class Uniform:
    """Keeps `keep` layers in all: those the placement fixes, and of the rest evenly."""

    keep: int | None = None  # distinct layers in all; None: four fifths

    name: ClassVar[str] = "uniform"
    stage: ClassVar[Stage] = "depth"
    provides: ClassVar[frozenset[str]] = frozenset({REDUCTION})
    needs: ClassVar[frozenset[str]] = frozenset()
    looks_at_text: ClassVar[bool] = False
    trains_on_text: ClassVar[bool] = False

    def kept(self, depth: int) -> int:
        """Return `keep`, or four fifths of the depth."""
        return kept_of(depth, self.keep)

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        """Decide by the layers' numbers alone; raises ValueError if they do not fit the depth."""
        depth = len(layers(model))
        return evenly(depth, self.kept(depth), placement)
