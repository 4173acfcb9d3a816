"""APET, arbitrary parameter-efficient tuning (Su et al., arXiv 2306.02320): a budget of values that chance places.

    y = W x + scale * B A x     or     y = W x + D x     (D (d_out, d_in), zero at the start)

The budget is a `share` of the maps' entries. At most half of it goes to whole matrices, in an order that is drawn from
the seed, each that still fits; the rest goes to pairs of factors of other maps, likewise. What is left then, as pairs
are small, goes to matrices in the place of pairs. The first pair of each layer stays, so that all layers train. The
paper draws from all tensors of the base; here they are those of the maps.
All sites have the same places, so that the mean is exact: of products, and of matrices value by value. What a method
gains by where and how its values train is what it gains over this one at an equal budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.methods.base import Adapter, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.targets import Modules
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema, Tier

Sizes = Mapping[Place, tuple[int, int]]  # a map's (d_out, d_in)


class Changed(Beside):
    """A linear map with a product of two factors beside it, or with a matrix as large as its own."""

    def __init__(self, linear: nn.Module, parts: Parts, *, scale: float) -> None:
        """Take the map, what trains, and what multiplies a product."""
        super().__init__(linear, parts)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        parts = self.parts
        if "change" in parts:
            return y + functional.linear(x.to(parts["change"].dtype), parts["change"]).to(y.dtype)
        along = functional.linear(functional.linear(x.to(parts["A"].dtype), parts["A"]), parts["B"])
        return y + (self.scale * along).to(y.dtype)


@dataclass(frozen=True)
class Apet(BesideMaps):
    """Train a `share` of the maps' entries' number: "28.self_attn.q_proj.A" and ".B", or ".change" (d_out, d_in).

    The rank is lower than `rank` where one pair in each layer would take more than half of the budget.
    """

    share: float = 0.0625
    rank: int = 16
    scale: float = 2.0  # of products, whatever their rank
    modules: Modules = "all-linear"

    name: ClassVar[str] = "apet"
    rate: ClassVar[float] = 1e-3
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT, Rule.MEAN})
    paper: ClassVar[str] = "arXiv 2306.02320"
    kind: ClassVar[Kind] = Kind.HYBRID
    formula: ClassVar[Formula] = Formula("map", "pair * (d_out + d_in) or d_out * d_in")
    mergeable: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share is a part of the maps' entries, above 0 and at most 1; got {self.share}")
        if self.rank < 1 or self.scale <= 0:
            raise ValueError(f"rank must be at least 1 and scale positive, got {self.rank} and {self.scale}")

    @property
    def axes(self) -> Axes:
        """Those of a pair, and of a matrix."""
        return {"A": ("rank", "columns"), "B": ("rows", "rank"), "change": ("rows", "columns")}

    def expected(self, linear: nn.Module, parts: Parts) -> Axes:
        """Return a matrix for a map that has one, and a pair for any other."""
        return {part: axes for part, axes in self.axes.items() if (part == "change") == ("change" in parts)}

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has none of the maps, or the budget has no pair for each layer."""
        self._rank(self._sizes(model, places))

    def schema(self, start: Adapter) -> Schema:
        """Return products, whose ranks are open, and matrices that are averaged value by value."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            for part, tensor in parts.items():
                size = tuple(
                    None if axis == "rank" else own for axis, own in zip(self.axes[part], tensor.shape, strict=True)
                )
                rule = Rule.MEAN if part == "change" else Rule.PRODUCT
                fields[place.key(part)] = Field("F32", size, rule, f"{place.layer}.{place.path}")
        return fields

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return pairs and matrices that change nothing, at places drawn from the seed; raises ValueError as `fits`."""
        sizes = self._sizes(model, places)
        adapter: Adapter = {}
        for place, rank in self._ranks(sizes, seed).items():
            d_out, d_in = sizes[place]
            if not rank:
                adapter[place.key("change")] = torch.zeros(d_out, d_in)
                continue
            A = torch.empty(rank, d_in)
            A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator(seed, place.key("A")))
            adapter |= {place.key("A"): A, place.key("B"): torch.zeros(d_out, rank)}
        return adapter

    def beside(self, linear: nn.Module, parts: Parts) -> Changed:
        """Return a map with its pair or its matrix."""
        return Changed(linear, parts, scale=self.scale)

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and the bias as it is."""
        return W + (parts["change"] if "change" in parts else self.scale * parts["B"] @ parts["A"]), b

    def _sizes(self, model: nn.Module, places: Mapping[int, int]) -> Sizes:
        stack = find(model).layers
        maps = self.maps(model, places)
        return {Place(places[at], path): shape(stack[at].get_submodule(path)) for at in maps for path in maps[at]}

    def _budget(self, sizes: Sizes) -> int:
        return round(self.share * sum(d_out * d_in for d_out, d_in in sizes.values()))

    def _rank(self, sizes: Sizes) -> int:
        """Return the rank at which any one pair in each layer takes at most half of the budget; raises ValueError."""
        largest: dict[int, int] = {}
        for place, size in sizes.items():
            largest[place.layer] = max(largest.get(place.layer, 0), sum(size))
        half, one = self._budget(sizes) // 2, sum(largest.values())
        if half < one:
            raise ValueError(
                f"share {self.share} of the maps' entries is {self._budget(sizes)} values, and half of them must have "
                f"room for a pair of rank 1 in each of {len(largest)} layers, which takes {one}; raise share"
            )
        return min(self.rank, half // one)

    def _ranks(self, sizes: Sizes, seed: int) -> dict[Place, int]:
        """Return the rank of each map that has a pair, and 0 for each that has a matrix."""
        rank, budget = self._rank(sizes), self._budget(sizes)
        pairs = {place: rank * sum(size) for place, size in sizes.items()}
        whole = {place: d_out * d_in for place, (d_out, d_in) in sizes.items()}
        first = {place.layer: place for place in reversed(_shuffled(sizes, seed, "pairs"))}.values()
        ranks, room = dict.fromkeys(first, rank), budget // 2
        for place in _shuffled(sizes, seed, "matrices"):
            if place not in ranks and whole[place] <= room:
                ranks[place], room = 0, room - whole[place]
        left = budget - sum(pairs[place] if at else whole[place] for place, at in ranks.items())
        for place in _shuffled(sizes, seed, "pairs"):
            if place not in ranks and pairs[place] <= left:
                ranks[place], left = rank, left - pairs[place]
        for place in _shuffled(sizes, seed, "matrices"):
            more = whole[place] - (pairs[place] if place in ranks else 0)
            if place not in first and ranks.get(place) != 0 and more <= left:
                ranks[place], left = 0, left - more
        return dict(sorted(ranks.items()))


def _shuffled(sizes: Sizes, seed: int, purpose: str) -> list[Place]:
    """Return the maps in an order that is drawn, in which two keep theirs whichever other maps there are."""
    return sorted(sizes, key=lambda place: generator(seed, place.key(purpose)).initial_seed())
