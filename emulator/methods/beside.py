"""What methods have in common that train some tensors beside each of some linear maps.

An adapter has "28.self_attn.o_proj.down" for the tensor `down` beside that map. A dimension of a tensor is one of the
map's rows (d_out), one of its columns (d_in), or as large as a setting of the method says, by whose name it goes; and
so it is known what becomes of it where an emulator's maps were narrowed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Set
from itertools import chain
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find, is_transposed, linears, shape
from offsite.emulator.formats.packed import dense
from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter, Averaged, Formula, Kind, Place
from offsite.emulator.methods.maps import linear_at, moved, wrapped
from offsite.emulator.methods.targets import Attention, MlpOutput, Modules, Outputs, targets
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Tier

Axes: TypeAlias = Mapping[str, tuple[str, ...]]  # by tensor, what its dimensions are: "rows", "columns", "width"
Parts: TypeAlias = dict[str, Tensor]  # what is beside one map


class Beside(nn.Module):
    """A linear map and what trains beside it, in fp32; each method has a forward of its own."""

    def __init__(self, linear: nn.Module, parts: Mapping[str, Tensor], *, fixed: Set[str] = frozenset()) -> None:
        """Take the map, the tensors by name, and which do not train; a parameter is one that other maps have, too."""
        super().__init__()
        self.linear = linear
        for name, tensor in parts.items():
            if name in fixed:
                self.register_buffer(name, tensor, persistent=False)
            else:
                self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """What trains."""
        return dict(self.named_parameters(recurse=False))


def grouped(adapter: Mapping[str, Tensor], axes: Axes) -> dict[Place, Parts]:
    """Group an adapter by map; raises ValueError for a key, or a shape, that is none of these tensors'."""
    maps: dict[Place, Parts] = {}
    for key, tensor in adapter.items():
        name, _, part = key.rpartition(".")
        layer, _, path = name.partition(".")
        if not (layer.isdecimal() and path and part in axes and tensor.ndim == len(axes[part])):
            ways = ", ".join(f"{one} ({', '.join(dimensions)})" for one, dimensions in axes.items())
            raise ValueError(
                f"adapter key {key!r} {tuple(tensor.shape)}: expected '<layer>.<path>.<tensor>', of {ways}"
            )
        maps.setdefault(Place(int(layer), path), {})[part] = tensor
    return maps


class BesideMaps(Averaged, ABC):
    """A method of this kind. Unless it says otherwise, weights cannot take in what it trains, and chance starts it."""

    name: ClassVar[str]
    rate: ClassVar[float]
    paper: ClassVar[str]
    kind: ClassVar[Kind]
    formula: ClassVar[Formula]
    needs: ClassVar[frozenset[str]] = frozenset()
    attaches: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    seeded: ClassVar[bool] = True
    common: ClassVar[frozenset[str]] = frozenset()  # tensors that all maps have together; they lie at the first map
    fixed: ClassVar[frozenset[str]] = frozenset()  # tensors that do not train, which are buffers beside a map

    @property
    @abstractmethod
    def axes(self) -> Axes:
        """What the dimensions of each tensor are."""

    @property
    @abstractmethod
    def modules(self) -> Modules | Outputs | MlpOutput | Attention:
        """Which maps they are beside: a setting of each method."""

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return a tensor to start from, such that a map's together change nothing: zeros, unless a method draws."""
        return torch.zeros(size)

    @abstractmethod
    def beside(self, linear: nn.Module, parts: Parts) -> Beside:
        """Return a map with its tensors beside it."""

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight W (d_out, d_in) and the bias b (d_out,) of a map with its tensors.

        Raises ValueError where a method says nothing else, for what is not linear is no change of a weight.
        """
        raise ValueError(f"what {self.name} trains is not linear: put it beside the base (offsite.emulator.plug.load)")

    def of_map(self, linear: nn.Module) -> Axes:
        """Return the tensors that one map has: all of them, unless its kind of map lacks what some would change."""
        return self.axes

    def expected(self, linear: nn.Module, parts: Parts) -> Axes:
        """Return the tensors that a map has which has some of these: `of_map`, unless other ones may be there."""
        return self.of_map(linear)

    def size(self, linear: nn.Module, part: str) -> tuple[int, ...]:
        """Return the shape of a tensor beside a map."""
        d_out, d_in = shape(linear)
        sizes = {"rows": d_out, "columns": d_in}
        return tuple(sizes[axis] if axis in sizes else getattr(self, axis) for axis in self.axes[part])

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps at each place; raises ValueError if a layer, or an ending, has none."""
        maps = targets(model, places, self.modules)
        for at, paths in maps.items():
            if not paths:
                has = ", ".join(linears(find(model).layers[at])) or "none"
                raise ValueError(f"layer {places[at]} has no linear map of modules; name some of those it has: {has}")
        return maps

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has none of the maps, or an ending names none."""
        self.maps(model, places)

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return tensors that change nothing; those that are drawn have a CPU generator of their own each."""
        stack = find(model).layers
        adapter: Adapter = {}
        maps = self.maps(model, places)
        first = min((Place(places[at], path) for at, paths in maps.items() for path in paths), default=None)
        for at, paths in maps.items():
            for place in (Place(places[at], path) for path in paths):
                parts = self.initial(place, stack[at].get_submodule(place.path), seed)
                adapter |= {
                    place.key(part): tensor
                    for part, tensor in parts.items()
                    if place == first or part not in self.common
                }
        return adapter

    def initial(self, place: Place, linear: nn.Module, seed: int) -> Parts:
        """Return what a map starts from: each tensor drawn by itself, unless a method says otherwise."""
        return {
            part: self.draw(part, self.size(linear, part), generator(seed, place.key(part)))
            for part in self.of_map(linear)
        }

    def placed(self, adapter: Mapping[str, Tensor]) -> dict[Place, Parts]:
        """Group an adapter by map, and give each map what all have in common.

        Raises ValueError as `grouped` does, and if that lies anywhere but at the first map of the lowest layer.
        """
        maps = grouped(adapter, self.axes)
        first = min(maps, default=Place(0, ""))
        for place, parts in maps.items():
            if self.common & parts.keys() != (self.common if place == first else set()):
                raise ValueError(
                    f"{place.layer}.{place.path} has {', '.join(parts)}: what all maps have in common, "
                    f"{', '.join(sorted(self.common))}, lies at the first of them, {first.layer}.{first.path}"
                )
        return {place: {part: maps[first][part] for part in self.common} | parts for place, parts in maps.items()}

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put the tensors beside the maps, in place; raises ValueError if they do not fit."""
        maps = self.placed(adapter)
        fitting = list(self.fitting(model, {at: maps[place] for place, at in moved(maps, places).items()}))
        model.requires_grad_(False)
        stack = find(model).layers
        common: dict[str, nn.Parameter] = {}
        for place, linear, parts in fitting:
            device = next(chain(linear.parameters(), linear.buffers())).device
            own = _at(device, {name: part for name, part in parts.items() if name not in common})
            common |= {name: nn.Parameter(own.pop(name)) for name in self.common & own.keys()}
            stack[place.layer].set_submodule(place.path, self.beside(linear, own | common))
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU copies, in fp32 but for integers."""
        modules = wrapped(model, places, Beside)
        fixed = {place.key(name): at.get_buffer(name) for place, at in modules.items() for name in self.fixed}
        return _at(torch.device("cpu"), {**self.named_parameters(model, places), **fixed})

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live tensors of an attached model by adapter key, each once."""
        modules = wrapped(model, places, Beside)
        first = min(modules, default=None)
        return {
            place.key(name): parameter
            for place, module in modules.items()
            for name, parameter in module.parts.items()
            if place == first or name not in self.common
        }

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Put zeros for the rows and columns that were left out where the emulator's maps were narrowed.

        `recovery` is as `methods.recovery.widen` has it. Raises ValueError if it does not fit.
        """
        wide: Adapter = {}
        for place, parts in grouped(adapter, self.axes).items():
            name = f"{place.layer}.{place.path}"
            full = dict(zip(("rows", "columns"), recovery.get(f"{name}.shape", torch.empty(0)).tolist(), strict=False))
            for part, tensor in parts.items():
                for dim, axis in enumerate(self.axes[part]):
                    if axis in full:
                        kept = recovery.get(f"{name}.{axis}", torch.arange(full[axis]))
                        if tensor.shape[dim] != len(kept):
                            raise ValueError(
                                f"{place.key(part)} {tuple(tensor.shape)} does not fit a map with {len(kept)} {axis}"
                            )
                        size = [*tensor.shape[:dim], full[axis], *tensor.shape[dim + 1 :]]
                        tensor = tensor.new_zeros(size).index_copy(dim, kept, tensor)
                wide[place.key(part)] = tensor
        return wide

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Have the weights and biases take the tensors in, in place and in fp32; raises ValueError as `merged` does."""
        with torch.no_grad():
            for _, linear, parts in list(self.fitting(base, self.placed(adapter))):
                weight = linear.get_parameter("weight")
                bias = None if linear.bias is None else linear.get_parameter("bias")
                own = None if bias is None else bias.float()
                W, b = self.merged(dense(linear), own, _at(weight.device, parts))
                weight.copy_(W.T if is_transposed(linear) else W)
                if bias is not None and b is not None:
                    bias.copy_(b)

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `offsite_adapter.json` and `.safetensors`, for `offsite.emulator.plug.load` on the base."""
        list(self.fitting(base, self.placed(adapter)))
        own_format.write(directory, self, adapter, base_name=base_name)

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map of a model, at its own layer numbers, with its tensors; raises ValueError if one does not fit.

        Other sizes than rows and columns are the adapter's, the same for all tensors of a map.
        """
        for place, parts in maps.items():
            linear = linear_at(model, place)
            d_out, d_in = shape(linear)
            axes, sizes = self.expected(linear, parts), {"rows": d_out, "columns": d_in}
            if parts.keys() != axes.keys():
                raise ValueError(
                    f"{place.layer}.{place.path} takes {', '.join(axes)}, the adapter has {', '.join(parts)}"
                )
            for part, tensor in parts.items():
                for axis, size in zip(axes[part], tensor.shape, strict=True):
                    if sizes.setdefault(axis, size) != size:
                        raise ValueError(
                            f"{place.key(part)!r} {tuple(tensor.shape)}, of {', '.join(axes[part])}, does not fit a "
                            f"linear map of (d_out, d_in) = {(d_out, d_in)}"
                        )
            yield place, linear, parts


def _at(device: torch.device, parts: Mapping[str, Tensor]) -> Parts:
    """Return copies on a device, in fp32 but for integers."""
    return {
        name: part.detach().to(device, torch.float32 if part.is_floating_point() else part.dtype, copy=True)
        for name, part in parts.items()
    }
