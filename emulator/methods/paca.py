"""PaCA, partial connection adaptation (Woo et al., arXiv 2503.01905): some columns of each map train, chosen at random.

With the change of r columns in the place of two factors of rank r there is one tensor a map, of r * d_out values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from offsite.emulator.anatomy.structure import find, linears, shape
from offsite.emulator.methods.base import Formula, Place
from offsite.emulator.methods.selection import COLUMNS, SelectedEntries, Selection
from offsite.emulator.methods.targets import Modules, targets
from offsite.emulator.seeds import generator


@dataclass(frozen=True)
class Paca(SelectedEntries):
    """Train `rank` columns of each map: "28.self_attn.q_proj.columns" (rank,) and ".change" (d_out, rank)."""

    rank: int = 8
    modules: Modules = "all-linear"

    name: ClassVar[str] = "paca"
    rate: ClassVar[float] = 1e-2  # columns of W move less a step than products of two factors
    paper: ClassVar[str] = "arXiv 2503.01905"
    formula: ClassVar[Formula] = Formula("map", "rank * d_out")

    def __post_init__(self) -> None:
        """Check the range."""
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def select(self, model: nn.Module, places: Mapping[int, int], *, seed: int) -> dict[Place, Selection]:
        """Return columns drawn for each map alone; raises ValueError if a layer has no map, or one too few columns."""
        stack = find(model).layers
        chosen: dict[Place, Selection] = {}
        for at, paths in targets(model, places, self.modules).items():
            if not paths:
                has = ", ".join(linears(stack[at])) or "none"
                raise ValueError(
                    f"layer {places[at]} has no linear map of modules; name some of those that it has: {has}"
                )
            for path in paths:
                place = Place(places[at], path)
                _, d_in = shape(stack[at].get_submodule(path))
                if self.rank > d_in:
                    raise ValueError(f"rank {self.rank} is more than the {d_in} columns of {place.layer}.{path}")
                index = torch.randperm(d_in, generator=generator(seed, place.key(COLUMNS)))[: self.rank]
                chosen[place] = Selection(COLUMNS, index.sort().values)
        return chosen
