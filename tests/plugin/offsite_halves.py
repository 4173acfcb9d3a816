"""Plug-ins of a package of its own: half of the layers, LoRA on queries and values, and a coarser average."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from offsite.coordinator.aggregation.low_rank import LowRank
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders.base import Stage, evenly
from offsite.emulator.methods.lora import Lora
from offsite.emulator.modality import Batch
from offsite.emulator.outline import REDUCTION, Outline
from offsite.emulator.placements import Placement
from offsite.protos.documents import document


@dataclass(frozen=True)
class Halves:
    """Keeps half of the layers, at even distances, and at least four."""

    name: ClassVar[str] = "halves"
    stage: ClassVar[Stage] = "depth"
    provides: ClassVar[frozenset[str]] = frozenset({REDUCTION})
    needs: ClassVar[frozenset[str]] = frozenset()
    looks_at_text: ClassVar[bool] = False
    trains_on_text: ClassVar[bool] = False

    def kept(self, depth: int) -> int:
        return max(4, depth // 2)

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        depth = len(layers(model))
        return evenly(depth, self.kept(depth), placement)


@dataclass(frozen=True)
class QueryValue(Lora):
    """LoRA on the maps of queries and values, as in its paper."""

    modules: tuple[str, ...] = ("q_proj", "v_proj")

    name: ClassVar[str] = "query-value"


@document
class Tolerant(LowRank):
    """The exact average, with what is small left out of it."""

    name: ClassVar[str] = "tolerant"
    tolerance: float = 1e-3
