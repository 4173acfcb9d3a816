"""Sketches (SketchTune, arXiv 2410.06364): each map as 4-bit codes and, for each row group, 16 centroids that train.

What matters is where an error hurts: each column counts by the mean square of its input on the calibration text. On
SmolLM2-135M that takes two thirds off what clustering costs which counts all columns alike.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.builders.base import Material, Stage
from offsite.emulator.builders.storage import Which, chosen, importance, refuse_shapes
from offsite.emulator.formats.base import Parts
from offsite.emulator.formats.packed import dense, pack
from offsite.emulator.formats.sketch import Sketch
from offsite.emulator.outline import CENTROIDS, Draft, Outline
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
    looks_at_text: ClassVar[bool] = True
    trains_on_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.groups < 1 or self.iterations < 0:
            raise ValueError(
                f"groups must be at least 1 and iterations not negative, got {self.groups} and {self.iterations}"
            )

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> None:
        """Raise ValueError if there is nothing to pack, or a map does not fit; the model may have no weights."""
        refuse_shapes(model, chosen(outline, self.layers), Sketch(self.groups))

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the draft with sketched maps; what brings grids that train to the base goes into `recovery`.

        Raises ValueError without calibration text, or if there is no layer to sketch or a map that does not fit.
        """
        outline, format, stack = draft.outline, Sketch(self.groups), layers(draft.model)
        places = chosen(outline, self.layers)
        squares = importance(draft, places, format, material.batches)
        parts: dict[tuple[int, str], Parts] = {}
        recovery = dict(draft.recovery)
        for step, place in enumerate(places, start=1):
            for path in linears(stack[place]):
                matrix = dense(stack[place].get_submodule(path))
                weights = squares[place, path].to(matrix.device)
                grid, codes = sketch(matrix, weights, groups=self.groups, iterations=self.iterations)
                parts[place, path] = {"codes": codes, "grid": grid}
                if place in outline.places:
                    name = f"{outline.layers[place]}.{path}"
                    recovery |= {f"{name}.codes": codes.cpu(), f"{name}.grid": grid.to("cpu", copy=True)}
            material.tell(self.name, step, len(places))
        return replace(draft, model=pack(draft.model, parts, format), recovery=recovery)
