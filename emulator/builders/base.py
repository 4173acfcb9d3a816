"""What a builder decides: which layers of the base the emulator has, and which of them train."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import nn

from offsite.emulator.batches import Batch


@dataclass(frozen=True)
class Outline:
    """The layers of an emulator. `layers[p]` is the base's layer that place p stands for, by absolute id.

    A place in `shared` has the parameters of the place it maps to, which itself is not in `shared`.
    """

    layers: tuple[int, ...]
    trainable: tuple[int, ...]
    shared: dict[int, int] = field(default_factory=dict)

    @property
    def places(self) -> dict[int, int]:
        """Place in the emulator -> absolute id, of the layers that train."""
        return {place: layer for place, layer in enumerate(self.layers) if layer in self.trainable}


class Builder(Protocol):
    """A way to build emulators; its fields are its settings."""

    name: ClassVar[str]

    def outline(self, model: nn.Module, batches: Sequence[Batch]) -> Outline:
        """Decide on the layers, looking at calibration text if need be; raises ValueError if they do not fit."""
        ...


def kept_of(depth: int, keep: int | None) -> int:
    """Return how many layers to keep: as asked, else four fifths, which still guides training without distillation."""
    return math.ceil(0.8 * depth) if keep is None else keep


def middle(depth: int, *, keep: int, bottom: int, top: int) -> range:
    """Return the layers between the ends; raises ValueError unless `keep` holds the ends and one layer more."""
    ends(depth, bottom=bottom, top=top)
    if not bottom + top < keep <= depth:
        raise ValueError(
            f"keep counts all layers the emulator keeps, ends included: it must be in {bottom + top + 1}..{depth} "
            f"for a base of {depth} layers with {bottom} + {top} at the ends, got {keep}"
        )
    return range(bottom, depth - top)


def ends(depth: int, *, bottom: int, top: int) -> tuple[int, ...]:
    """Return the lowest `bottom` and highest `top` layers; raises ValueError if there is none, or no middle."""
    if bottom < 0 or top < 0 or not 0 < bottom + top < depth:
        raise ValueError(
            f"bottom and top must leave a middle: bottom + top must be in 1..{depth - 1} for a base of {depth} "
            f"layers, got {bottom} + {top}"
        )
    return (*range(bottom), *range(depth - top, depth))
