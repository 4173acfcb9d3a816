"""The whole base, nothing removed: for sites that may hold it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from offsite.emulator.anatomy import layers
from offsite.emulator.batches import Batch
from offsite.emulator.builders.base import Outline, ends


@dataclass(frozen=True)
class Whole:
    """Trains the lowest `bottom` and the highest `top` layers, or all of them if both are 0."""

    bottom: int = 0
    top: int = 0

    name: ClassVar[str] = "whole"

    def outline(self, model: nn.Module, batches: Sequence[Batch]) -> Outline:
        """Keep every layer; raises ValueError if there are not as many as are to train."""
        every = tuple(range(len(layers(model))))
        chosen = self.bottom or self.top
        return Outline(every, ends(len(every), bottom=self.bottom, top=self.top) if chosen else every)
