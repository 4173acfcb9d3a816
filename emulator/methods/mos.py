"""MoS, mixture of shards (Wang et al., arXiv 2410.00938): LoRA whose factors are put together from pools of all layers.

    A_k = rows of pool_A[index_A[k]]        B_k' = rows of pool_B[index_B[k]]        W_k' = W_k + scale * B_k A_k

Maps of one path, such as "mlp.down_proj" of every layer that trains, have one pool for A and one for B. A shard is
1 / `shards` of a vector, and a row of A_k, or a column of B_k, is `shards` of them side by side. Which ones is drawn
from the run's seed, for each layer and for A and B by itself, and never changes. So a few values give every layer a
higher rank than LoRA of as many values has. Of the pools, each layer has some rows to itself, and the rest is common.

No layer owns a pool. In an adapter it lies at the lowest layer that takes from it, and each layer has its indices.
Cut into several `pools`, its shards are as many groups, so that with a part of the adapter some of them train alone.
Pools are averaged by their mean. As that of LoRA's factors, it is not the mean of the changes, which are products.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Averaged, Factors, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, grouped
from offsite.emulator.methods.lora import Lora
from offsite.emulator.methods.maps import moved, wrapped
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import Modules
from offsite.emulator.outline import NARROWED
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema, Tier

POOLS, INDICES = ("pool_A", "pool_B"), ("index_A", "index_B")
AXES: Axes = {index: ("rank", "places") for index in INDICES}


class Assembled(nn.Module):
    """A linear map with a product beside it, in fp32, whose factors are read off pools that other maps have, too."""

    def __init__(
        self, linear: nn.Module, pools: Mapping[str, nn.Parameter], indices: list[Tensor], *, scale: float
    ) -> None:
        """Take the map, pools (n, d_in / l) and (n, d_out / l) by name, an index (r, l) into each, and the scale."""
        super().__init__()
        self.linear, self.scale, self.pools = linear, scale, tuple(pools)
        for name, pool in pools.items():
            self.register_parameter(name, pool)
        for name, index in zip(INDICES, indices, strict=True):
            self.register_buffer(name, index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        pools = {name: self.get_parameter(name) for name in self.pools}
        A, B = assemble(*(whole(pools, pool) for pool in POOLS), *(self.get_buffer(index) for index in INDICES))
        return y + (self.scale * functional.linear(functional.linear(x.to(A.dtype), A), B)).to(y.dtype)


class Mixture(NamedTuple):
    """An adapter's part for all maps of one path: the pools by name, and by layer an int64 index (r, l) into each."""

    pools: dict[str, Tensor]  # those of A, in their order, and then those of B
    indices: dict[int, tuple[Tensor, Tensor]]


def cut(pool: str, count: int) -> list[str]:
    """Return the names of so many pools into which one is cut."""
    return [pool] if count == 1 else [f"{pool}_{at}" for at in range(count)]


def whole(pools: Mapping[str, Tensor], pool: str) -> Tensor:
    """Return "pool_A" or "pool_B" (n, width) of the pools that it is cut into."""
    pieces = [piece for name, piece in pools.items() if name.startswith(pool)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def assemble(pool_A: Tensor, pool_B: Tensor, index_A: Tensor, index_B: Tensor) -> Factors:
    """Return A (r, d_in) and B (d_out, r), made of the shards that two indices (r, l) name."""
    rows, columns = functional.embedding(index_A, pool_A), functional.embedding(index_B, pool_B)
    return Factors(rows.flatten(1), columns.flatten(1).T)


def mixtures(adapter: Mapping[str, Tensor]) -> dict[str, Mixture]:
    """Group an adapter by the paths of maps; raises ValueError for keys that are none of MoS's."""
    paths: dict[str, dict[int, Adapter]] = {}
    names = {key.rpartition(".")[2] for key in adapter}
    pools = {name: ("shards", "width") for pool in POOLS for name in cut(pool, _count(names))}
    for place, parts in grouped(adapter, {**pools, **AXES}).items():
        paths.setdefault(place.path, {})[place.layer] = parts
    mixed: dict[str, Mixture] = {}
    for path, layers in paths.items():
        lowest = min(layers)
        own = [name for pool in POOLS for name in cut(pool, _count(layers[lowest]))]
        for layer, parts in layers.items():
            if parts.keys() != {*INDICES, *(own if layer == lowest else ())}:
                raise ValueError(
                    f"{layer}.{path} has {', '.join(sorted(parts))}: each of its layers {sorted(layers)} has "
                    f"{' and '.join(INDICES)}, and the lowest, {lowest}, has {' and '.join(own)} for all of them"
                )
        indices = {layer: (parts["index_A"].long(), parts["index_B"].long()) for layer, parts in layers.items()}
        mixed[path] = Mixture({name: layers[lowest][name] for name in own}, indices)
    return mixed


def _count(names: Collection[str]) -> int:
    """Return into how many pools each is cut, by their names."""
    return max(1, sum(name.startswith("pool_A_") for name in names))


def materialise(adapter: Mapping[str, Tensor]) -> dict[Place, Factors]:
    """Return the factors of each map, as LoRA has them; raises ValueError as `mixtures` does, and for an odd index."""
    pairs: dict[Place, Factors] = {}
    for path, (pools, indices) in mixtures(adapter).items():
        pool_A, pool_B = (whole(pools, pool) for pool in POOLS)
        for layer, (index_A, index_B) in indices.items():
            for name, index, pool in zip(INDICES, (index_A, index_B), (pool_A, pool_B), strict=True):
                if index.shape != index_A.shape or not bool(((index >= 0) & (index < len(pool))).all()):
                    raise ValueError(
                        f"{layer}.{path}.{name} {tuple(index.shape)}: expected numbers of shards in "
                        f"0..{len(pool) - 1}, as many as {INDICES[0]} has, {tuple(index_A.shape)}"
                    )
            pairs[Place(layer, path)] = assemble(pool_A, pool_B, index_A, index_B)
    return pairs


@dataclass(frozen=True)
class Mos(Averaged):
    """Train "0.mlp.down_proj.pool_A" (n, d_in / l) and ".pool_B" (n, d_out / l), n = budget * layers * l.

    Cut into several pools they are ".pool_A_0" (n / pools, d_in / l) and so on, and those of one number are a group.
    Every layer k has "k.mlp.down_proj.index_A" (r, l) and ".index_B" (r, l) into them. As many values train as LoRA of
    rank `budget` has, whatever the other settings say.
    """

    budget: int = 2
    rank: int = 8  # of each layer's product, at least the budget
    shards: int = 4  # of a vector, whose size they must divide
    private: int = 1  # rows of the budget that one layer has to itself
    alpha: float = 16.0
    pools: int = 1  # into which the shards of A, and those of B, are dealt, as evenly as can be, the private ones last
    modules: Modules = "all-linear"

    name: ClassVar[str] = "mos"
    needs: ClassVar[frozenset[str]] = frozenset()
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})  # other columns would be gone in each layer
    rate: ClassVar[float] = 3e-3
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    attaches: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2410.00938"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "budget * (d_in + d_out)")
    linear: ClassVar[bool] = False
    seeded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.shards < 1 or self.alpha <= 0:
            raise ValueError(f"shards must be at least 1 and alpha positive, got {self.shards} and {self.alpha}")
        if not 1 <= self.budget <= self.rank:
            raise ValueError(f"budget must be in 1..rank, got {self.budget} and rank {self.rank}")
        if not 1 <= self.pools <= self.budget * self.shards:
            raise ValueError(f"pools must be in 1..budget * shards = {self.budget * self.shards}, got {self.pools}")
        if not 0 <= self.private <= self.budget:
            raise ValueError(f"private must be in 0..budget, got {self.private} and budget {self.budget}")
        if self.private == self.budget < self.rank:
            raise ValueError(
                f"private = budget = {self.budget} leaves no common shards for the other {self.rank - self.private} "
                "rows of each layer; lower private, or rank to the budget"
            )

    @property
    def scale(self) -> float:
        """What multiplies the products."""
        return self.alpha / self.rank

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, dict[int, tuple[int, int]]]:
        """Return (d_out, d_in) of the maps by path and layer, the lowest first.

        Raises ValueError if a layer, or an ending, has none, if those of one path differ, or shards do not divide them.
        """
        stack, kinds = find(model).layers, dict[str, dict[int, tuple[int, int]]]()
        listed = peft_format.maps(model, places, self.modules, method="MoS")
        for at, layer in sorted(places.items(), key=lambda pair: pair[1]):
            for path in listed[at]:
                size = shape(stack[at].get_submodule(path))
                kind = kinds.setdefault(path, {})
                first, usual = next(iter(kind.items()), (layer, size))
                if size != usual:
                    raise ValueError(
                        f"{layer}.{path} has (d_out, d_in) = {size} and {first}.{path} has {usual}: they cannot share "
                        "pools; name other maps as modules, or train layers that are alike"
                    )
                if size[0] % self.shards or size[1] % self.shards:
                    raise ValueError(
                        f"{layer}.{path} has (d_out, d_in) = {size}, which {self.shards} shards do not divide; set "
                        "shards to a number that divides both, or name other maps as modules"
                    )
                kind[layer] = size
        return kinds

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if maps cannot train, as `maps` says."""
        self.maps(model, places)

    def schema(self, start: Adapter) -> Schema:
        """Return pools that are averaged, and indices that all sites have in common."""
        fields: Schema = {}
        for path, mixture in mixtures(start).items():
            lowest = Place(min(mixture.indices), path)
            count = len(mixture.pools) // 2
            for pool in POOLS:
                below, own = 0, self.private * len(mixture.indices) * self.shards
                for at, name in reversed([*enumerate(cut(pool, count))]):  # the last have the private shards
                    size, group = tuple(mixture.pools[name].shape), lowest.key(str(at))
                    private = min(own, size[0])
                    fields[lowest.key(name)] = Field("F32", size, Rule.MEAN, group, private=private)
                    below, own = below + size[0], own - private
            for layer, indices in mixture.indices.items():
                for name, index in zip(INDICES, indices, strict=True):
                    fields[Place(layer, path).key(name)] = Field("I32", tuple(index.shape), Rule.FIXED, below=below)
        return fields

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return A's pools uniform in +-1/sqrt(d_in), B's zero, and indices, each from a CPU generator of its own.

        How large a pool is depends on how many layers train.
        """
        adapter: Adapter = {}
        for path, kind in self.maps(model, places).items():
            lowest, (d_out, d_in) = next(iter(kind.items()))
            n, bound = self.budget * len(kind) * self.shards, d_in**-0.5
            A = torch.empty(n, d_in // self.shards)
            A.uniform_(-bound, bound, generator=generator(seed, Place(lowest, path).key("pool_A")))
            for pool, shards in zip(POOLS, (A, torch.zeros(n, d_out // self.shards)), strict=True):
                for name, piece in zip(cut(pool, self.pools), shards.tensor_split(self.pools), strict=True):
                    adapter[Place(lowest, path).key(name)] = piece.clone()
            for order, layer in enumerate(kind):
                for name in INDICES:
                    key = Place(layer, path).key(name)
                    adapter[key] = self._index(order, len(kind), generator(seed, key)).int()
        return adapter

    def _index(self, order: int, layers: int, random: torch.Generator) -> Tensor:
        """Return an index (r, l) for one of so many layers: common shards, and in the last rows those of its own.

        No common shard is taken twice, as in the paper, unless so few layers train that a layer asks for more than
        there are: then it takes all of them before it takes one again.
        """
        common, asked = (self.budget - self.private) * layers * self.shards, (self.rank - self.private) * self.shards
        drawn = torch.cat([torch.randperm(common, generator=random) for _ in range(asked // max(common, 1) + 1)])
        own = common + torch.arange(self.private * self.shards) + order * self.private * self.shards
        return torch.cat([drawn[:asked], own]).view(self.rank, self.shards)

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put products beside the maps, in place, that read the same pools; raises ValueError if they do not fit."""
        pairs, position = materialise(adapter), {layer: at for at, layer in places.items()}
        there = {at: pairs[place] for place, at in moved(pairs, places).items()}
        peft_format.config_of(model, there, dict.fromkeys(there, self.scale))  # refuses what does not fit
        model.requires_grad_(False)
        stack = find(model).layers
        for path, mixture in mixtures(adapter).items():
            lowest = stack[position[min(mixture.indices)]].get_submodule(path)
            device = next(chain(lowest.parameters(), lowest.buffers())).device
            pools = {
                name: nn.Parameter(pool.detach().to(device, torch.float32, copy=True))
                for name, pool in mixture.pools.items()
            }
            for layer, indices in mixture.indices.items():
                linear = stack[position[layer]].get_submodule(path)
                beside = Assembled(linear, pools, [index.to(device) for index in indices], scale=self.scale)
                stack[position[layer]].set_submodule(path, beside)
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU copies."""
        live = self.named_parameters(model, places)
        adapter = {key: pool.detach().to("cpu", torch.float32, copy=True) for key, pool in live.items()}
        for place, module in wrapped(model, places, Assembled).items():
            for name in INDICES:
                adapter[place.key(name)] = module.get_buffer(name).to("cpu", torch.int32, copy=True)
        return adapter

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live pools of an attached model, each once, by adapter key."""
        live: dict[str, nn.Parameter] = {}
        lowest: dict[str, Place] = {}
        for place, module in sorted(wrapped(model, places, Assembled).items()):
            if lowest.setdefault(place.path, place) == place:
                live |= {place.key(name): module.get_parameter(name) for name in module.pools}
        return live

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(materialise(adapter), recovery, "of which each layer lacks other rows and columns")
        return adapter

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add scale * B @ A to the weights, in place and in fp32; raises ValueError if it does not fit."""
        pairs = materialise(adapter)
        factors = {place.key(name): factor for place, pair in pairs.items() for name, factor in pair._asdict().items()}
        Lora(rank=self.rank, alpha=self.alpha).merge(base, factors)

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write LoRA of the same change, for `PeftModel.from_pretrained` on the base: no longer with common pools."""
        pairs = materialise(adapter)
        peft_format.write(directory, pairs, dict.fromkeys(pairs, self.scale), base=base, base_name=base_name)
