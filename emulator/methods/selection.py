"""What methods have in common that train some columns or rows of linear maps.

    y = W x + D x[J]   (columns J of W change by D, d_out x r)          y[J] += D x   (rows J by D, r x d_in)

D starts at zero and J is the same at all sites, so W is linear in what trains: the mean of the changes is the change of
the mean, exactly. Of columns, only x[J] is kept for the backward pass, in place of x (see `kernels.partial`). The
entries of one map are a matrix of rank r, and leave as LoRA of that rank, which others load.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import find, is_transposed, shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Averaged, Factors, Kind, Place
from offsite.emulator.methods.maps import linear_at, moved, wrapped
from offsite.kernels.partial import add_columns, add_rows
from offsite.kernels.schema import Field, Rule, Schema, Tier

COLUMNS, ROWS = SIDES = ("columns", "rows")


class Selected(nn.Module):
    """A linear map with what is added to some of its columns or rows, in fp32."""

    def __init__(self, linear: nn.Module, side: str, index: Tensor, change: Tensor) -> None:
        """Take the map, the index (r,) of its columns or rows, and their change."""
        super().__init__()
        self.linear, self.side = linear, side
        self.register_buffer("index", index.long(), persistent=False)
        self.change = nn.Parameter(change)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        add = add_columns if self.side == COLUMNS else add_rows
        return add(y, x, self.get_buffer("index"), self.change)


class Selection(NamedTuple):
    """Which columns or rows of a map train, int64 (r,)."""

    side: str
    at: Tensor


class Change(NamedTuple):
    """An adapter's part for one map: what trains, and by how much it has changed."""

    side: str
    at: Tensor  # int64 (r,)
    change: Tensor


def changes(adapter: Mapping[str, Tensor]) -> dict[Place, Change]:
    """Group an adapter by map; raises ValueError on a key that is none of an adapter's."""
    parts: dict[Place, Change] = {}
    for key in adapter:
        name, _, part = key.rpartition(".")
        layer, _, path = name.partition(".")
        if not (layer.isdecimal() and path and part in (*SIDES, "change")):
            raise ValueError(f"adapter key {key!r}: expected '<layer>.<path>.change', '.columns' or '.rows'")
        sides = [side for side in SIDES if f"{name}.{side}" in adapter]
        if len(sides) != 1 or f"{name}.change" not in adapter:
            raise ValueError(f"the adapter has {key!r}, but not a change and one index of {name}")
        index, change = adapter[f"{name}.{sides[0]}"].long(), adapter[f"{name}.change"]
        if change.ndim != 2 or change.shape[1 if sides[0] == COLUMNS else 0] != len(index):
            raise ValueError(f"{name}.change {tuple(change.shape)} is not of {len(index)} {sides[0]}")
        parts[Place(int(layer), path)] = Change(sides[0], index, change)
    return parts


class SelectedEntries(Averaged, ABC):
    """A method of this kind; it says which entries of which maps it trains."""

    needs: ClassVar[frozenset[str]] = frozenset()
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    attaches: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.SELECTIVE
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = True

    @abstractmethod
    def select(self, model: nn.Module, places: Mapping[int, int], *, seed: int) -> dict[Place, Selection]:
        """Return the entries that train, by absolute layer and path; raises ValueError if a layer has none."""

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has none of the maps, or they are too small."""
        self.select(model, places, seed=0)

    def schema(self, start: Adapter) -> Schema:
        """Return changes that are averaged, and indices that all sites have in common."""
        fields: Schema = {}
        for place, (side, index, change) in changes(start).items():
            group = f"{place.layer}.{place.path}"
            fields[place.key(side)] = Field("I32", (len(index),), Rule.FIXED, group, below=int(index.max()) + 1)
            fields[place.key("change")] = Field("F32", tuple(change.shape), Rule.MEAN, group)
        return fields

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return changes of zero, and indices from a CPU generator of its own for each map."""
        stack, position = find(model).layers, {layer: at for at, layer in places.items()}
        adapter: Adapter = {}
        for place, (side, index) in self.select(model, places, seed=seed).items():
            d_out, d_in = shape(stack[position[place.layer]].get_submodule(place.path))
            size = (d_out, len(index)) if side == COLUMNS else (len(index), d_in)
            adapter |= {place.key(side): index.int(), place.key("change"): torch.zeros(size)}
        return adapter

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put the changes beside the maps, in place; raises ValueError if they do not fit."""
        parts = changes(adapter)
        there = {at: parts[place] for place, at in moved(parts, places).items()}
        _check(model, there)
        model.requires_grad_(False)
        stack = find(model).layers
        for place, (side, index, change) in there.items():
            linear = linear_at(model, place)
            device = next(chain(linear.parameters(), linear.buffers())).device
            change = change.detach().to(device, torch.float32, copy=True)
            stack[place.layer].set_submodule(place.path, Selected(linear, side, index.to(device), change))
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU copies."""
        adapter: Adapter = {}
        for place, selected in wrapped(model, places, Selected).items():
            adapter[place.key(selected.side)] = selected.get_buffer("index").to("cpu", torch.int32, copy=True)
            adapter[place.key("change")] = selected.change.detach().to("cpu", torch.float32, copy=True)
        return adapter

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live changes of an attached model by adapter key."""
        return {place.key("change"): selected.change for place, selected in wrapped(model, places, Selected).items()}

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Name the entries as the base does where the emulator's maps were narrowed; what was left out changes by zero.

        `recovery` is as `methods.recovery.widen` has it. Raises ValueError if it does not fit.
        """
        wide: Adapter = {}
        for place, (side, index, change) in changes(adapter).items():
            name = f"{place.layer}.{place.path}"
            if f"{name}.shape" in recovery:
                full = dict(zip((ROWS, COLUMNS), recovery[f"{name}.shape"].tolist(), strict=True))
                kept = {at: recovery.get(f"{name}.{at}", torch.arange(size)) for at, size in full.items()}
                across, dim = (ROWS, 0) if side == COLUMNS else (COLUMNS, 1)
                if int(index.max()) >= len(kept[side]) or change.shape[dim] != len(kept[across]):
                    sizes = (len(kept[ROWS]), len(kept[COLUMNS]))
                    raise ValueError(f"{name}.change {tuple(change.shape)} does not fit a map narrowed to {sizes}")
                wider = list(change.shape)
                wider[dim] = full[across]
                change = change.new_zeros(wider).index_copy(dim, kept[across], change)
                index = kept[side][index]
            wide |= {place.key(side): index.int(), place.key("change"): change}
        return wide

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add the changes to the weights, in place and in fp32; raises ValueError if they do not fit."""
        parts = changes(adapter)
        _check(base, parts)
        with torch.no_grad():
            for place, (side, index, change) in parts.items():
                module = linear_at(base, place)
                weight = module.get_parameter("weight")
                dim = int((side == COLUMNS) != is_transposed(module))
                change = change.T if is_transposed(module) else change
                device = weight.device
                weight.copy_(weight.float().index_add(dim, index.to(device), change.to(device, torch.float32)))

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write LoRA of the same change, one factor of zeros and ones, for `PeftModel.from_pretrained` on the base."""
        parts = changes(adapter)
        _check(base, parts)
        pairs: dict[Place, Factors] = {}
        for place, (side, index, change) in parts.items():
            d_out, d_in = shape(linear_at(base, place))
            ones = functional.one_hot(index, d_in if side == COLUMNS else d_out).to(torch.float32)
            pairs[place] = Factors(ones, change) if side == COLUMNS else Factors(change, ones.T)
        peft_format.write(directory, pairs, dict.fromkeys(pairs, 1.0), base=base, base_name=base_name)


def _check(model: nn.Module, parts: Mapping[Place, Change]) -> None:
    """Raise ValueError unless a model has these maps at its own layer numbers, as large as their changes ask."""
    for place, (side, index, change) in parts.items():
        d_out, d_in = shape(linear_at(model, place))
        across, along = (d_out, d_in) if side == COLUMNS else (d_in, d_out)
        if change.shape[0 if side == COLUMNS else 1] != across or not 0 <= int(index.min()) <= int(index.max()) < along:
            raise ValueError(
                f"{place.key('change')!r}: {tuple(change.shape)} of {side} {int(index.min())}..{int(index.max())} does "
                f"not fit a linear map of (d_out, d_in) = {(d_out, d_in)}"
            )
