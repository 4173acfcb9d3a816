"""S2FT, structured sparse fine-tuning (Yang et al., arXiv 2412.06289): some channels and heads train, the rest do not.

A channel of the MLP owns a column of the map after it and a row of each map before it, and a KV group of the attention
likewise. The paper brings what was chosen to the front of each map, for a dense kernel; an index says the same, and
leaves the model's layout alone. It draws channels among all layers at once; here each layer has the same share, so that
what trains in a layer does not depend on which others do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from offsite.emulator.anatomy.narrow import Units, channels, groups
from offsite.emulator.anatomy.roles import Heads, Roles, heads, roles
from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.methods.base import Formula, Place
from offsite.emulator.methods.selection import COLUMNS, ROWS, SelectedEntries, Selection
from offsite.emulator.seeds import generator


@dataclass(frozen=True)
class S2ft(SelectedEntries):
    """Train a share of the channels, and of the KV groups, of each layer: "28.mlp.down_proj.columns" (n,), ".change".

    Of the maps after them it trains columns, and of those before them (of the attention, of the values) rows if asked.
    """

    channels: float = 0.03  # of the MLP, at least one unless 0
    groups: float = 0.0  # of the attention
    before: bool = False  # whether the rows of the maps before train too

    name: ClassVar[str] = "s2ft"
    rate: ClassVar[float] = 1e-2
    paper: ClassVar[str] = "arXiv 2412.06289"
    formula: ClassVar[Formula] = Formula(
        "layer",
        "d * ((channels and max(1, round(channels * d_ff))) * (1 + before * inward)"
        " + (groups and max(1, round(groups * kv))) * width * (heads // kv + before))",
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 <= self.channels <= 1 and 0 <= self.groups <= 1) or self.channels == self.groups == 0:
            raise ValueError(
                f"channels and groups are shares in 0..1, one of them above 0; got {self.channels} and {self.groups}"
            )

    def select(self, model: nn.Module, places: Mapping[int, int], *, seed: int) -> dict[Place, Selection]:
        """Return what belongs to the units drawn for each layer; raises ValueError if its maps play no known roles."""
        stack = find(model).layers
        chosen: dict[Place, Selection] = {}
        for at, layer in places.items():
            maps = roles(model, at)
            if self.channels:
                units = channels(stack[at], maps)
                chosen |= self._of(units, maps.mlp_in, layer, self.channels, seed)
            if self.groups:
                units = groups(stack[at], maps, _heads(stack[at], maps, heads(model)))
                chosen |= self._of(units, (maps.value,), layer, self.groups, seed)
        return chosen

    def _of(self, units: Units, inward: tuple[str, ...], layer: int, share: float, seed: int) -> dict[Place, Selection]:
        count = max(1, round(share * units.count))
        drawn = torch.randperm(units.count, generator=generator(seed, f"{layer}.{units.after.path}"))[:count]
        chosen = {Place(layer, units.after.path): Selection(COLUMNS, units.columns(drawn))}
        if self.before:  # where one map is query, key and value, its last part
            rows = {part.path: part.index[drawn].flatten().sort().values for part in units.before}
            chosen |= {Place(layer, path): Selection(ROWS, rows[path]) for path in inward}
        return chosen


def _heads(layer: nn.Module, maps: Roles, of: Heads) -> Heads:
    """Return the heads of a layer, of which a builder may have left some out, given those of the model's layers."""
    each = of.count // of.groups
    left = shape(layer.get_submodule(maps.output))[1] // (each * of.width)
    return Heads(each * left, left, of.width)
