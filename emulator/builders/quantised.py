"""Storage in 4 bits, as in QLoRA (Dettmers et al., arXiv 2305.14314): what does not train is rounded and packed."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from offsite.emulator import formats
from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.builders.base import Material, Stage
from offsite.emulator.builders.storage import Which, chosen, refuse_shapes
from offsite.emulator.formats.base import Parts
from offsite.emulator.formats.blockwise import Blockwise
from offsite.emulator.formats.packed import dense, pack
from offsite.emulator.outline import PACKED, Draft, Outline


@dataclass(frozen=True)
class Quantised:
    """Packs the linear maps of the frozen layers, or of all: then LoRA trains on packed maps, as in QLoRA."""

    format: str = "nf4"  # one of 16 levels and a scale for each block
    block: int = 64  # entries of a row that share a scale
    layers: Which = "frozen"

    name: ClassVar[str] = "quantised"
    stage: ClassVar[Stage] = "storage"
    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    alters: ClassVar[frozenset[str]] = frozenset({PACKED})
    looks_at_text: ClassVar[bool] = False
    trains_on_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the settings, which are the format's."""
        self._packing()

    def _packing(self) -> Blockwise:
        packing = formats.make(self.format, {"block": self.block})
        if not isinstance(packing, Blockwise):
            raise ValueError(f"format must be one of 16 levels and a scale for each block, got {self.format!r}")
        return packing

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> list[int]:
        """Return the places to pack, of a model that may have no weights; raises ValueError if a map does not fit."""
        places = chosen(outline, self.layers)
        refuse_shapes(model, places, self._packing())
        return places

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the draft with packed maps; raises ValueError if no layer is to be packed."""
        places = chosen(draft.outline, self.layers)
        packing, stack = self._packing(), layers(draft.model)
        parts: dict[tuple[int, str], Parts] = {}
        for step, place in enumerate(places, start=1):
            for path in linears(stack[place]):
                parts[place, path] = packing.encode(dense(stack[place].get_submodule(path)))
            material.tell(self.name, step, len(places))
        return replace(draft, model=pack(draft.model, parts, packing))
