"""What builders share: the outline of an emulator, an emulator in the making, and what may be used to make it.

A chain of builders makes an emulator. One of the stage "depth" decides which layers stay; then the stages "width",
"tuning" and "storage" may follow, in this order and each at most once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from offsite.emulator.batches import Batch, Encoded
from offsite.emulator.placements import Placement

Stage = Literal["depth", "width", "tuning", "storage"]
STAGES: tuple[Stage, ...] = ("depth", "width", "tuning", "storage")


@dataclass(frozen=True)
class Grounds:
    """On what layers were chosen: how alike they are, and how near another choice was."""

    links: dict[int, float]  # CKA of each layer that may go with the next of them
    gap: float  # log of the ratio of 1 - CKA, between what was told apart at the border
    margin: float  # below which other ways were looked at too
    ways: int  # how many there were; of more than one the calibration text decided
    lead: float | None  # nats a token by which the best was better than the next


@dataclass(frozen=True)
class Outline:
    """The layers of an emulator. `layers[p]` is the base's layer that place p stands for, by absolute id.

    A place in `shared` has the parameters of the place it maps to, which itself is not in `shared`.
    """

    layers: tuple[int, ...]
    trainable: tuple[int, ...]
    shared: dict[int, int] = field(default_factory=dict)
    grounds: Grounds | None = field(default=None, compare=False, repr=False)

    @property
    def places(self) -> dict[int, int]:
        """Place in the emulator -> absolute id, of the layers that train."""
        return {p: layer for p, layer in enumerate(self.layers) if layer in self.trainable and p not in self.shared}

    @property
    def own(self) -> list[int]:
        """The places that have parameters of their own."""
        return [place for place in range(len(self.layers)) if place not in self.shared]

    @property
    def frozen(self) -> list[int]:
        """The places that have parameters of their own and do not train."""
        return [place for place in self.own if place not in self.places]


@dataclass(frozen=True)
class Draft:
    """An emulator in the making.

    `model` has the outline's layers and shares with `base` every tensor that no builder changed; `base` is never
    changed. `tuned` are the places whose parameters were trained, so that they are no longer the base's. `recovery` is
    what the owner keeps to bring an adapter back to the base: "<layer>.<path inside the layer>.<part>" -> tensor.
    """

    base: nn.Module
    model: nn.Module
    outline: Outline
    tuned: tuple[int, ...] = ()
    recovery: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What a builder may use beside the model: text, a folder to resume from, and an ear for progress."""

    batches: Sequence[Batch] = ()  # calibration text: a few examples, in order of their length
    encoded: Sequence[Encoded] = ()  # public text to train on, in its own order
    scratch: Path | None = None  # a folder for the state of a long build, so that it can be resumed
    tell: Callable[[str, int, int], None] = lambda what, step, steps: None


class Builder(Protocol):
    """A way to build emulators, or a step of it; its fields are its settings."""

    name: ClassVar[str]
    stage: ClassVar[Stage]

    @property
    def looks_at_text(self) -> bool:
        """Whether it looks at how the model reads calibration text."""
        ...

    @property
    def trains_on_text(self) -> bool:
        """Whether it trains on public text."""
        ...


class DepthBuilder(Builder, Protocol):
    """A builder of the stage "depth"."""

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        """Decide which layers stay and which of them train; raises ValueError if the settings do not fit."""
        ...


class ChangeBuilder(Builder, Protocol):
    """A builder of the stages "width", "tuning" and "storage"."""

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> object:
        """Raise ValueError if an emulator of these shapes cannot be changed so; tuning asks nothing of them."""
        ...

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the next draft; the given one stays as it was. Raises ValueError if the settings do not fit."""
        ...


def kept_of(depth: int, keep: int | None) -> int:
    """Return how many layers to keep: as asked, else four fifths, which still guides training without distillation."""
    return math.ceil(0.8 * depth) if keep is None else keep


def droppable(depth: int, *, keep: int, fixed: Sequence[int]) -> list[int]:
    """Return the layers that may go; raises ValueError unless `keep` holds the `fixed` ones and one layer more."""
    if not len(fixed) < keep <= depth:
        raise ValueError(
            f"keep counts all layers the emulator keeps, those that train included: it must be in "
            f"{len(fixed) + 1}..{depth} for a base of {depth} layers with {len(fixed)} fixed, got {keep}"
        )
    return [layer for layer in range(depth) if layer not in fixed]
