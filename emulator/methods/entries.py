"""What methods have in common that train single entries of linear maps.

    y = W x + D x          (D: zero but for k entries, at a flat index into W, row * d_in + column)

D starts at zero and stands beside W, so W is linear in what trains, and neither a copy of W nor a mask of its size is
kept: see `kernels.sparse.product`. An adapter has three tensors for a map: "28.self_attn.q_proj.index" (k,) int32 that
rises, ".change" (k,), and ".size" (2,) int32, the map's (d_out, d_in), without which an index says nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find, is_transposed, linears, shape
from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter, Averaged, Formula, Kind, Place
from offsite.emulator.methods.maps import linear_at, moved, wrapped
from offsite.emulator.methods.targets import Modules, targets
from offsite.kernels.schema import Field, Rule, Schema, Tier
from offsite.kernels.sparse import Size, dense, product

PARTS = ("change", "index", "size")
MOST = 2**31 - 1  # entries of a map: an index is of 32 bits


class Sparse(NamedTuple):
    """An adapter's part for one map."""

    at: Tensor  # int32 (k,), a flat index that rises
    change: Tensor  # fp32 (k,)
    size: Size


class Entries(nn.Module):
    """A linear map with what is added to some of its entries, in fp32."""

    def __init__(self, linear: nn.Module, part: Sparse) -> None:
        """Take the map, and what is added to it."""
        super().__init__()
        self.linear, self.size = linear, part.size
        self.register_buffer("index", part.at, persistent=False)
        self.change = nn.Parameter(part.change)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        return y + product(x, self.get_buffer("index"), self.change, self.size).to(y.dtype)


def sparse(adapter: Mapping[str, Tensor]) -> dict[Place, Sparse]:
    """Group an adapter by map; raises ValueError on a key that is none of an adapter's, or tensors that do not fit."""
    parts: dict[Place, Sparse] = {}
    for key in adapter:
        name, _, part = key.rpartition(".")
        layer, _, path = name.partition(".")
        if not (layer.isdecimal() and path and part in PARTS):
            raise ValueError(f"adapter key {key!r}: expected '<layer>.<path>.change', '.index' or '.size'")
        if missing := [other for other in PARTS if f"{name}.{other}" not in adapter]:
            raise ValueError(f"the adapter has {key!r}, but not {name}.{missing[0]}")
        change, index, size = (adapter[f"{name}.{other}"] for other in PARTS)
        if index.shape != change.shape or index.ndim != 1 or size.shape != (2,):
            raise ValueError(
                f"{name}: index {tuple(index.shape)}, change {tuple(change.shape)} and size {tuple(size.shape)} are "
                "not (k,), (k,) and (2,)"
            )
        parts[Place(int(layer), path)] = Sparse(index.int(), change, (int(size[0]), int(size[1])))
    return parts


def tensors(parts: Mapping[Place, Sparse]) -> Adapter:
    """Return the adapter that has these parts."""
    adapter: Adapter = {}
    for place, (index, change, size) in parts.items():
        adapter |= {place.key("index"): index, place.key("change"): change}
        adapter[place.key("size")] = torch.tensor(size, dtype=torch.int32)
    return adapter


def fields(parts: Mapping[Place, Sparse]) -> Schema:
    """Return the fields of parts whose changes are averaged, and whose indices all sites have in common."""
    schema: Schema = {}
    for place, (index, _, (d_out, d_in)) in parts.items():
        group = f"{place.layer}.{place.path}"
        schema[place.key("index")] = Field("I32", (len(index),), Rule.FIXED, group, below=d_out * d_in)
        schema[place.key("change")] = Field("F32", (len(index),), Rule.MEAN, group)
        schema[place.key("size")] = Field("I32", (2,), Rule.FIXED, group, below=max(d_out, d_in) + 1)
    return schema


def put(model: nn.Module, parts: Mapping[Place, Sparse]) -> None:
    """Put changes beside maps at a model's own layer numbers, and freeze the rest; raises ValueError if one misfits."""
    check(model, parts)
    model.requires_grad_(False)
    stack = find(model).layers
    for place, (index, change, size) in parts.items():
        linear = linear_at(model, place)
        device = next(chain(linear.parameters(), linear.buffers())).device
        part = Sparse(index.to(device, copy=True), change.detach().to(device, torch.float32, copy=True), size)
        stack[place.layer].set_submodule(place.path, Entries(linear, part))


def read(model: nn.Module, places: Mapping[int, int]) -> Adapter:
    """Read what `put` put there as CPU copies."""
    return tensors(
        {
            place: Sparse(
                entries.get_buffer("index").to("cpu", copy=True),
                entries.change.detach().to("cpu", torch.float32, copy=True),
                entries.size,
            )
            for place, entries in wrapped(model, places, Entries).items()
        }
    )


def add(base: nn.Module, parts: Mapping[Place, Sparse]) -> None:
    """Add changes to the weights, in place and in fp32; raises ValueError if they do not fit."""
    check(base, parts)
    with torch.no_grad():
        for place, (index, change, size) in parts.items():
            module = linear_at(base, place)
            weight = module.get_parameter("weight")
            device = weight.device
            added = dense(index.to(device), change.to(device, torch.float32), size)
            weight.copy_(weight.float() + (added.T if is_transposed(module) else added))


def widened(parts: Mapping[Place, Sparse], recovery: Mapping[str, Tensor]) -> dict[Place, Sparse]:
    """Return parts as the base's maps have them where the emulator's were narrowed; raises ValueError on a misfit.

    `recovery` is as `methods.recovery.widen` has it.
    """
    wide: dict[Place, Sparse] = {}
    for place, part in parts.items():
        name = f"{place.layer}.{place.path}"
        if f"{name}.shape" in recovery:
            d_out, d_in = recovery[f"{name}.shape"].tolist()
            rows = recovery.get(f"{name}.rows", torch.arange(d_out))
            columns = recovery.get(f"{name}.columns", torch.arange(d_in))
            if part.size != (len(rows), len(columns)):
                raise ValueError(
                    f"{name}: entries of a map {part.size} do not fit one narrowed to {(len(rows), len(columns))}"
                )
            at = part.at.long()
            index, order = (rows[at // len(columns)] * d_in + columns[at % len(columns)]).sort()
            part = Sparse(index.int(), part.change[order], (d_out, d_in))
        wide[place] = part
    return wide


class SparseEntries(Averaged, ABC):
    """A method of this kind; it says which entries of each map it trains.

    A subclass is a frozen dataclass with a `share` of each map's entries, and `modules` that name the maps.
    """

    share: float
    modules: Modules

    name: ClassVar[str]
    rate: ClassVar[float]
    paper: ClassVar[str]
    seeded: ClassVar[bool]
    needs: ClassVar[frozenset[str]] = frozenset()
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    attaches: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.SELECTIVE
    formula: ClassVar[Formula] = Formula("map", "max(1, round(share * d_out * d_in))")
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share is a part of each map's entries, above 0 and at most 1; got {self.share}")

    @abstractmethod
    def select(self, place: Place, linear: nn.Module, count: int, *, seed: int) -> Tensor:
        """Return where the `count` entries of a map that train are, flat, integers (count,) that rise.

        Raises ValueError where that cannot be told of the map.
        """

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has none of the maps, or one is too large."""
        for place, linear in self._maps(model, places).items():
            d_out, d_in = shape(linear)
            if d_out * d_in > MOST:
                raise ValueError(
                    f"{place.layer}.{place.path} has {d_out} x {d_in} entries, and an index of 32 bits names {MOST}; "
                    "leave it out of modules"
                )

    def schema(self, start: Adapter) -> Schema:
        """Return changes that are averaged, and indices that all sites have in common."""
        return fields(sparse(start))

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return changes of zero of the entries that train."""
        self.fits(model, places)
        parts: dict[Place, Sparse] = {}
        for place, linear in self._maps(model, places).items():
            d_out, d_in = shape(linear)
            count = max(1, round(self.share * d_out * d_in))
            index = self.select(place, linear, count, seed=seed).int()
            parts[place] = Sparse(index, torch.zeros(count), (d_out, d_in))
        return tensors(parts)

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put the changes beside the maps, in place; raises ValueError if they do not fit."""
        parts = sparse(adapter)
        put(model, {at: parts[place] for place, at in moved(parts, places).items()})
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU copies."""
        return read(model, places)

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live changes of an attached model by adapter key."""
        return {place.key("change"): entries.change for place, entries in wrapped(model, places, Entries).items()}

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Name the entries as the base does where the emulator's maps were narrowed; what was left out does not change.

        `recovery` is as `methods.recovery.widen` has it. Raises ValueError if it does not fit.
        """
        return tensors(widened(sparse(adapter), recovery))

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add the changes to the weights, in place and in fp32; raises ValueError if they do not fit."""
        add(base, sparse(adapter))

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write the entries in the format of this project: peft's types for single entries fix how many a map has."""
        check(base, sparse(adapter))
        own_format.write(directory, self, adapter, base_name=base_name)

    def _maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[Place, nn.Module]:
        """Return the maps that train; raises ValueError if a layer has none."""
        stack = find(model).layers
        maps: dict[Place, nn.Module] = {}
        for at, paths in targets(model, places, self.modules).items():
            if not paths:
                has = ", ".join(linears(stack[at])) or "none"
                raise ValueError(
                    f"layer {places[at]} has no linear map of modules; name some of those that it has: {has}"
                )
            maps |= {Place(places[at], path): stack[at].get_submodule(path) for path in paths}
        return maps


def check(model: nn.Module, parts: Mapping[Place, Sparse]) -> None:
    """Raise ValueError unless a model has these maps at its own layer numbers, of the sizes that they say."""
    for place, (index, _, size) in parts.items():
        if size != (own := shape(linear_at(model, place))):
            raise ValueError(f"{place.key('size')!r}: {size} is not that of the map, (d_out, d_in) = {own}")
        most = size[0] * size[1] - 1
        if bool((index < 0).any() or (index > most).any() or (index.diff() < 1).any()):
            raise ValueError(f"{place.key('index')!r}: expected integers that rise, from 0 to {most} at most")
