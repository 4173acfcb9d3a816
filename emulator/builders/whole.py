"""The whole base, nothing removed: for sites that may hold it, and the start of builders that drop no layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders.base import Stage
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Outline
from offsite.emulator.placements import Placement


@dataclass(frozen=True)
class Whole:
    """Keeps every layer."""

    name: ClassVar[str] = "whole"
    stage: ClassVar[Stage] = "depth"
    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    looks_at_text: ClassVar[bool] = False
    trains_on_text: ClassVar[bool] = False

    def kept(self, depth: int) -> int:
        """Return all of them."""
        return depth

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        """Keep every layer; raises ValueError if there are not as many as are to train."""
        every = tuple(range(len(layers(model))))
        return Outline(every, placement.choose(every, len(every)))
