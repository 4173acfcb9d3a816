"""SPT, sensitivity-aware tuning (He et al., arXiv 2303.08566): a budget of values goes where the loss is sensitive.

The sensitivity of an entry of W is the sum over batches of its squared gradient, which sites measure in a run before:
`moments(of=squares)`. The most sensitive entries of all maps together say where values train: a map that has at least
rank * (d_out + d_in) / ratio of them gets a LoRA pair of that rank, and of others just these entries do:

    W + alpha / rank * B A     or     W + D     (D: zero but at the entries)

All sites have the same pairs and indices, so that the mean is exact: of products, and of entries value by value. As
many entries are taken as the budget has room for beside the pairs, and of each map at least one, so that every layer
has its part. Biases and norms, which the paper trains whole, stay as they are.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import find, is_transposed, shape
from offsite.emulator.methods import entries, own_format, peft_format
from offsite.emulator.methods.base import Adapter, Averaged, Factors, Formula, Kind, Place, factors
from offsite.emulator.methods.entries import Entries, Sparse, sparse
from offsite.emulator.methods.maps import linear_at, moved, wrapped
from offsite.emulator.methods.recovery import widen
from offsite.emulator.methods.sums import Statistics
from offsite.emulator.methods.targets import Modules
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema, Tier
from offsite.kernels.sparse import largest

FALL = 4.0  # from map to map, of random sensitivities


class Paired(nn.Module):
    """A linear map with a product of two factors beside it, in fp32."""

    def __init__(self, linear: nn.Module, pair: Factors, scale: float) -> None:
        """Take the map, A (r, d_in) and B (d_out, r), and what multiplies their product."""
        super().__init__()
        self.linear, self.scale = linear, scale
        self.A, self.B = nn.Parameter(pair.A), nn.Parameter(pair.B)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        along = functional.linear(functional.linear(x.to(self.A.dtype), self.A), self.B)
        return y + (self.scale * along).to(y.dtype)


@dataclass(frozen=True)
class Spt(Averaged):
    """Train a `share` of the maps' entries' number: "28.self_attn.q_proj.A" and ".B", or ".index" and ".change"."""

    share: float = 0.01
    rank: int = 8
    alpha: float = 16.0
    ratio: float = 10.0  # of the values of a pair to the sensitive entries that a map gets one for
    modules: Modules = "all-linear"

    name: ClassVar[str] = "spt"
    needs: ClassVar[frozenset[str]] = frozenset()
    rate: ClassVar[float] = 3e-3
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT, Rule.MEAN, Rule.FIXED})
    attaches: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2303.08566"
    kind: ClassVar[Kind] = Kind.HYBRID
    formula: ClassVar[Formula] = Formula("map", "max(1, round(share * d_out * d_in))")
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share is a part of the maps' entries, above 0 and at most 1; got {self.share}")
        if self.rank < 1 or self.alpha <= 0 or self.ratio < 1:
            raise ValueError(
                f"rank and ratio must be at least 1 and alpha positive, got {self.rank}, {self.ratio} and {self.alpha}"
            )

    @property
    def takes(self) -> str:
        """See `methods.base.Beginning`."""
        return "squares"

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has none of the maps, or one has too many entries to be named."""
        for place, linear in self._maps(model, places).items():
            d_out, d_in = shape(linear)
            if d_out * d_in > entries.MOST:
                raise ValueError(
                    f"{place.layer}.{place.path} has {d_out} x {d_in} entries, and an index of 32 bits names "
                    f"{entries.MOST}; leave it out of modules"
                )

    def schema(self, start: Adapter) -> Schema:
        """Return products, and changes of entries that all sites have in common."""
        pairs, parts = _apart(start)
        fields = entries.fields(parts)
        for place, (A, B) in pairs.items():
            group = f"{place.layer}.{place.path}"
            fields[place.key("A")] = Field("F32", (None, A.shape[1]), Rule.PRODUCT, group)
            fields[place.key("B")] = Field("F32", (B.shape[0], None), Rule.PRODUCT, group)
        return fields

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return an adapter of random sensitivities, of which the first maps' are the largest: it has both kinds."""
        self.fits(model, places)
        scores = {
            place: torch.rand(shape(linear), generator=generator(seed, place.key("score"))) * FALL**-at
            for at, (place, linear) in enumerate(self._maps(model, places).items())
        }
        return self._made(scores, seed=seed)

    def begin(
        self, model: nn.Module, places: Mapping[int, int], statistics: Adapter, *, seed: int, tier: Tier = ""
    ) -> Adapter:
        """See `methods.base.Beginning`."""
        self.fits(model, places)
        measured, maps = Statistics(statistics, model, places), self._maps(model, places)
        scores = {place: measured.of_weight(place, "squares", shape(linear)) for place, linear in maps.items()}
        return self._made(scores, seed=seed)

    def _made(self, scores: Mapping[Place, Tensor], *, seed: int) -> Adapter:
        """Return the adapter that changes nothing, given the sensitivity (d_out, d_in) of each map's entries."""
        pairs = self._pairs(scores)
        adapter: Adapter = {}
        for place in pairs:
            d_out, d_in = scores[place].shape
            A = torch.empty(self.rank, d_in)
            A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator(seed, place.key("A")))
            adapter |= {place.key("A"): A, place.key("B"): torch.zeros(d_out, self.rank)}
        rest = {place: score for place, score in scores.items() if place not in pairs}
        left = self._budget(scores) - sum(self._cost(scores[place]) for place in pairs)
        return adapter | entries.tensors(_most(rest, left))

    def _budget(self, scores: Mapping[Place, Tensor]) -> int:
        return sum(max(1, round(self.share * score.numel())) for score in scores.values())

    def _cost(self, score: Tensor) -> int:
        return self.rank * sum(score.shape)

    def _pairs(self, scores: Mapping[Place, Tensor]) -> list[Place]:
        """Return the maps that get a pair: those that would first if ever more entries were sensitive."""
        levels: dict[Place, float] = {}
        for place, score in scores.items():
            count = ceil(self._cost(score) / self.ratio)
            if count <= score.numel():
                levels[place] = float(score.flatten().topk(count, sorted=False).values.min())
        order = sorted(levels, key=lambda place: -levels[place])

        def values(number: int) -> int:
            """Return how many values train once so many maps have pairs, at the sensitivity that gives the last one."""
            pairs, level = order[:number], levels[order[number - 1]]
            alone = [int((score >= level).sum()) for place, score in scores.items() if place not in pairs]
            return sum(self._cost(scores[place]) for place in pairs) + sum(max(1, count) for count in alone)

        return order[: bisect_right(range(1, len(order) + 1), self._budget(scores), key=values)]

    def _maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[Place, nn.Module]:
        """Return the maps that train; raises ValueError if a layer has none."""
        stack = find(model).layers
        return {
            Place(places[at], path): stack[at].get_submodule(path)
            for at, paths in peft_format.maps(model, places, self.modules, method="SPT").items()
            for path in paths
        }

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put pairs and changes beside the maps, in place; raises ValueError if they do not fit."""
        pairs, parts = _apart(adapter)
        at = moved([*pairs, *parts], places)
        _check(model, {at[place]: pair for place, pair in pairs.items()})
        entries.put(model, {at[place]: part for place, part in parts.items()})
        stack = find(model).layers
        for place, pair in pairs.items():
            linear = linear_at(model, at[place])
            device = next(chain(linear.parameters(), linear.buffers())).device
            own = Factors(*(factor.detach().to(device, torch.float32, copy=True) for factor in pair))
            stack[at[place].layer].set_submodule(place.path, Paired(linear, own, self.alpha / self.rank))
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU copies."""
        pairs = {
            place.key(part): paired.get_parameter(part).detach().to("cpu", torch.float32, copy=True)
            for place, paired in wrapped(model, places, Paired).items()
            for part in "AB"
        }
        return pairs | entries.read(model, places)

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        live = {
            place.key(part): paired.get_parameter(part)
            for place, paired in wrapped(model, places, Paired).items()
            for part in "AB"
        }
        return live | {place.key("change"): one.change for place, one in wrapped(model, places, Entries).items()}

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter as the base's maps have it where the emulator's were narrowed; the rest is zero.

        `recovery` is as `methods.recovery.widen` has it. Raises ValueError if it does not fit.
        """
        pairs, parts = _apart(adapter)
        wide = widen({key: adapter[key] for place in pairs for key in map(place.key, "AB")}, recovery) if pairs else {}
        return wide | entries.tensors(entries.widened(parts, recovery))

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add products and changes to the weights, in place and in fp32; raises ValueError if they do not fit."""
        pairs, parts = _apart(adapter)
        _check(base, pairs)
        entries.add(base, parts)
        with torch.no_grad():
            for place, pair in pairs.items():
                module = linear_at(base, place)
                weight = module.get_parameter("weight")
                A, B = (factor.to(weight.device, torch.float32) for factor in pair)
                change = self.alpha / self.rank * B @ A
                weight.copy_(weight.float() + (change.T if is_transposed(module) else change))

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write pairs and entries in the format of this project: no type of peft's has both."""
        pairs, parts = _apart(adapter)
        _check(base, pairs)
        entries.check(base, parts)
        own_format.write(directory, self, adapter, base_name=base_name)


def _most(scores: Mapping[Place, Tensor], count: int) -> dict[Place, Sparse]:
    """Return the `count` most sensitive entries of maps together, at least one of each, unchanged."""
    heights: list[Tensor] = []
    for score in scores.values():
        height = score.flatten().clone()
        height[height.argmax()] = torch.inf
        heights.append(height)
    if count > (has := sum(map(len, heights))):
        raise ValueError(
            f"share asks for {count} values more than pairs of the rank have, and the maps without one have {has} "
            "entries; lower share, or raise rank"
        )
    if not heights:
        return {}
    chosen = torch.zeros(has, dtype=torch.bool).index_fill(0, largest(torch.cat(heights), count), value=True)
    parts: dict[Place, Sparse] = {}
    for (place, score), mask in zip(scores.items(), torch.split(chosen, [len(one) for one in heights]), strict=True):
        index = mask.nonzero().flatten().int()
        parts[place] = Sparse(index, torch.zeros(len(index)), (score.shape[0], score.shape[1]))
    return parts


def _apart(adapter: Mapping[str, Tensor]) -> tuple[dict[Place, Factors], dict[Place, Sparse]]:
    """Return pairs, and entries, by map; raises ValueError on what is neither, or on a map that has both."""
    factored = {key: tensor for key, tensor in adapter.items() if key.rpartition(".")[2] in ("A", "B")}
    pairs = factors(factored) if factored else {}
    parts = sparse({key: tensor for key, tensor in adapter.items() if key not in factored})
    if both := sorted(pairs.keys() & parts.keys()):
        raise ValueError(f"the adapter has a pair and entries of {both[0].layer}.{both[0].path}: expected one of them")
    return pairs, parts


def _check(model: nn.Module, pairs: Mapping[Place, Factors]) -> None:
    """Raise ValueError unless a model has these maps at its own layer numbers, of the sizes of their factors."""
    for place, (A, B) in pairs.items():
        if (B.shape[0], A.shape[1]) != (own := shape(linear_at(model, place))):
            raise ValueError(f"{place.key('A')!r}: {(B.shape[0], A.shape[1])} is not the map's (d_out, d_in) = {own}")
