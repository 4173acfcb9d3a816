"""Sketches (SketchTune, arXiv 2410.06364): each map as 4-bit codes and, for each row group, 16 centroids that train.

What matters is where an error hurts: each column counts by the mean square of its input on the calibration text. On
SmolLM2-135M that takes two thirds off what clustering costs which counts all columns alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from offsite.emulator.activations import Map
from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.builders.base import Material, Stage
from offsite.emulator.builders.storage import Which, change, chosen, importance, refuse_shapes
from offsite.emulator.formats.base import Parts
from offsite.emulator.formats.packed import dense, pack
from offsite.emulator.formats.sketch import Sketch
from offsite.emulator.outline import CENTROIDS, PACKED, Draft, Outline
from offsite.kernels.sketch import sketch


@dataclass(frozen=True)
class Sketched:
    """Sketches the linear maps of the frozen layers or of all, with `groups` grids a row.

    Where layers that train are sketched, the method "grids" trains their centroids. `iterations` counts Lloyd's steps,
    of which few are needed: they start near the optimum.
    """

    groups: int = 1
    layers: Which = "all"
    iterations: int = 4

    name: ClassVar[str] = "sketch"
    stage: ClassVar[Stage] = "storage"
    provides: ClassVar[frozenset[str]] = frozenset({CENTROIDS})
    needs: ClassVar[frozenset[str]] = frozenset()
    alters: ClassVar[frozenset[str]] = frozenset({PACKED})
    looks_at_text: ClassVar[bool] = True
    trains_on_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.groups < 1 or self.iterations < 0:
            raise ValueError(
                f"groups must be at least 1 and iterations not negative, got {self.groups} and {self.iterations}"
            )

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> list[int]:
        """Return the places to pack, of a model that may have no weights; raises ValueError if a map does not fit."""
        places = chosen(outline, self.layers)
        refuse_shapes(model, places, Sketch(self.groups))
        return places

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the draft with sketched maps; what brings grids that train to the base goes into `recovery`.

        Raises ValueError without calibration text, or if there is no layer to sketch or a map that does not fit.
        """
        return change(self, draft, material)

    def places(self, outline: Outline) -> list[int]:
        """Return the places to sketch; raises ValueError if there is none."""
        return chosen(outline, self.layers)

    def look(self, draft: Draft, material: Material) -> dict[Map, Tensor]:
        """Return the mean square of each map's inputs on the calibration text, by which a column counts."""
        return importance(draft, self.places(draft.outline), Sketch(self.groups), material.batches)

    def encode(
        self, draft: Draft, places: Sequence[int], weights: Mapping[Map, Tensor], material: Material
    ) -> dict[Map, Parts]:
        """Sketch the maps of some places."""
        stack = layers(draft.model)
        parts: dict[Map, Parts] = {}
        for step, place in enumerate(places, start=1):
            for path in linears(stack[place]):
                matrix = dense(stack[place].get_submodule(path))
                counts = weights[place, path].to(matrix.device)
                grid, codes = sketch(matrix, counts, groups=self.groups, iterations=self.iterations)
                parts[place, path] = {"codes": codes, "grid": grid}
            material.tell(self.name, step, len(places))
        return parts

    def finish(self, draft: Draft, encoded: Mapping[Map, Parts], material: Material) -> Draft:
        """Return the draft with sketched maps; what brings grids that train to the base goes into `recovery`."""
        outline, recovery = draft.outline, dict(draft.recovery)
        for (place, path), parts in encoded.items():
            if place in outline.places:
                name = f"{outline.layers[place]}.{path}"
                codes, grid = parts["codes"].cpu(), parts["grid"].to("cpu", copy=True)
                recovery |= {f"{name}.codes": codes, f"{name}.grid": grid}
        return replace(draft, model=pack(draft.model, encoded, Sketch(self.groups)), recovery=recovery)
