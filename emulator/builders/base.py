"""What builders share: their stages, what they may use, and the interface of each kind.

A chain of builders makes an emulator. One of the stage "depth" decides which layers stay; then the stages "width",
"tuning" and "storage" may follow, in this order and each at most once.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from offsite.emulator.activations import Map
from offsite.emulator.formats.base import Parts
from offsite.emulator.methods.base import Adapter, Method
from offsite.emulator.modality import Batch, Sample
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.placements import Placement

Stage = Literal["depth", "width", "tuning", "storage"]
STAGES: tuple[Stage, ...] = ("depth", "width", "tuning", "storage")


@dataclass(frozen=True)
class Material:
    """What a builder may use beside the model: text, a folder to resume from, and an ear for progress."""

    batches: Sequence[Batch] = ()  # calibration text: a few examples, in order of their length
    samples: Sequence[Sample] = ()  # public text to train on, in its own order
    scratch: Path | None = None  # a folder for the state of a long build, so that it can be resumed
    tell: Callable[[str, int, int], None] = lambda what, step, steps: None


class Builder(Protocol):
    """A way to build emulators, or a step of it; its fields are its settings."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    provides: ClassVar[frozenset[str]]  # what emulators have that it built, such as `outline.REDUCTION`
    needs: ClassVar[frozenset[str]]  # what those must have that it goes on with

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

    def kept(self, depth: int) -> int:
        """Return how many of `depth` layers it keeps, which does not depend on any text."""
        ...

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        """Decide which layers stay and which of them train; raises ValueError if the settings do not fit."""
        ...


class ChangeBuilder(Builder, Protocol):
    """A builder of the stages "width", "tuning" and "storage"."""

    alters: ClassVar[frozenset[str]]  # what the layers that it changes are then, such as `outline.NARROWED`

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> Collection[int]:
        """Return the places that it changes; raises ValueError if an emulator of these shapes cannot be changed so."""
        ...

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the next draft; the given one stays as it was. Raises ValueError if the settings do not fit."""
        ...


@runtime_checkable
class Separable(Protocol):
    """A builder of the stage "storage" that encodes each place by itself, so that machines may do some places each.

    What it does at once is `storage.change`: it looks, encodes all places, and finishes.
    """

    def places(self, outline: Outline) -> list[int]:
        """Return the places whose maps it encodes; raises ValueError if there is none."""
        ...

    def look(self, draft: Draft, material: Material) -> dict[Map, Tensor]:
        """Return what it must know of the whole emulator to encode a map: a weight (d_in,) fp64 for each input.

        Raises ValueError without the text that it needs, and if a map does not fit.
        """
        ...

    def encode(
        self, draft: Draft, places: Sequence[int], weights: Mapping[Map, Tensor], material: Material
    ) -> dict[Map, Parts]:
        """Return what the maps of some places are stored as, each of its own matrix and weights alone."""
        ...

    def finish(self, draft: Draft, encoded: Mapping[Map, Parts], material: Material) -> Draft:
        """Return the draft with all of its places encoded; raises ValueError if it cannot be finished so."""
        ...


@runtime_checkable
class Realigner(Protocol):
    """A builder whose work is gone on with between rounds, beside what the sites have trained so far."""

    def realigned(
        self, draft: Draft, material: Material, *, steps: int, method: Method, adapter: Adapter, recovered: Adapter
    ) -> Draft:
        """Return the draft changed again, without the adapter in it; `recovered` is the adapter as the base has it.

        The given draft stays as it was. Raises ValueError if it cannot be changed.
        """
        ...


def kept_of(depth: int, keep: int | None) -> int:
    """Return how many layers to keep: as asked, else four fifths, which still guides training without distillation."""
    return math.ceil(0.8 * depth) if keep is None else keep


def evenly(depth: int, keep: int, placement: Placement) -> Outline:
    """Keep `keep` layers in all: those the placement fixes, and of the rest evenly; raises ValueError."""
    fixed = placement.fixed(depth)
    inner = droppable(depth, keep=keep, fixed=fixed)
    kept = sorted({*fixed, *(inner[at] for at in even(len(inner), keep - len(fixed)))})
    return Outline(tuple(kept), placement.choose(kept, depth))


def even(n: int, k: int) -> list[int]:
    """Choose k of n indices, round(i (n-1)/(k-1)) with halves to the even one; a single one is the middle."""
    return [n // 2] if k == 1 else [round(i * (n - 1) / (k - 1)) for i in range(k)]


def droppable(depth: int, *, keep: int, fixed: Sequence[int]) -> list[int]:
    """Return the layers that may go; raises ValueError unless `keep` holds the `fixed` ones and one layer more."""
    if not len(fixed) < keep <= depth:
        raise ValueError(
            f"keep counts all layers the emulator keeps, those that train included: it must be in "
            f"{len(fixed) + 1}..{depth} for a base of {depth} layers with {len(fixed)} fixed, got {keep}"
        )
    return [layer for layer in range(depth) if layer not in fixed]
