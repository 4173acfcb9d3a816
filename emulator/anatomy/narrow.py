"""Narrower layers: fewer channels of the MLP, and fewer KV groups of the attention.

Both are units of one kind: a unit owns rows of the maps before it and columns of the map after it, so that leaving it
out is the same as setting those columns to zero. A unit of the attention is a whole KV group, its keys and values with
all the query heads that use them; what works head by head, such as rotary positions, does not see the change.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.roles import Heads, Roles, heads, roles
from offsite.emulator.anatomy.structure import is_transposed, layers, linears, shape

Shape = tuple[int, int]  # (d_out, d_in)


@dataclass(frozen=True, eq=False)
class Part:
    """The rows or columns of a map that belong to each unit, int64 (units, n)."""

    path: str
    index: Tensor


@dataclass(frozen=True, eq=False)
class Units:
    """What can be left out of a layer one by one: what each owns of the maps before it and of the map after it."""

    what: str
    before: tuple[Part, ...]
    after: Part
    counters: tuple[str, ...]  # where the module around the map after it keeps a number that goes with theirs

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.after.index)

    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        """Return the rows that remain of each map before, ascending, if the units `kept` do."""
        rows: dict[str, list[Tensor]] = {}
        for part in self.before:
            rows.setdefault(part.path, []).append(part.index[kept].flatten())
        return {path: torch.cat(parts).sort().values for path, parts in rows.items()}

    def columns(self, kept: Tensor) -> Tensor:
        """Return the columns that remain of the map after, ascending, if the units `kept` do."""
        return self.after.index[kept].flatten().sort().values

    def shapes(self, full: Mapping[str, Shape], kept: int) -> dict[str, Shape]:
        """Return (d_out, d_in) of each map if `kept` units remain, given those of the full maps."""
        some = torch.arange(kept)
        before = {path: (len(rows), full[path][1]) for path, rows in self.rows(some).items()}
        return before | {self.after.path: (full[self.after.path][0], len(self.columns(some)))}


def channels(layer: nn.Module, maps: Roles) -> Units:
    """Return the channels of a layer's MLP; raises ValueError if its maps do not fit each other."""
    each = torch.arange(shape(layer.get_submodule(maps.mlp_out))[1])[:, None]
    before = tuple(Part(path, each) for path in maps.mlp_in)
    return _checked(layer, Units("channels of the MLP", before, Part(maps.mlp_out, each), ("intermediate_size",)))


def groups(layer: nn.Module, maps: Roles, of: Heads) -> Units:
    """Return the KV groups of a layer's attention; raises ValueError if they cannot be told apart, or depend on more.

    BLOOM's cannot go: ALiBi gives each head a slope by its number among all heads.
    """
    if maps.alibi:
        raise ValueError("heads see positions by their number (ALiBi), so none may go: leave the attention whole")
    sizes = [of.count // of.groups * of.width, of.width, of.width]  # rows of q, k and v for each group
    if maps.fused == "groups":
        index = torch.split(torch.arange(of.groups * sum(sizes)).view(of.groups, -1), sizes, dim=1)
    elif maps.fused == "blocks":
        blocks = torch.split(torch.arange(of.groups * sum(sizes)), [of.groups * size for size in sizes])
        index = tuple(block.view(of.groups, -1) for block in blocks)
    else:
        index = tuple(torch.arange(of.groups * size).view(of.groups, -1) for size in sizes)
    before = tuple(map(Part, (maps.query, maps.key, maps.value), index))
    after = Part(maps.output, torch.arange(of.groups * sizes[0]).view(of.groups, -1))
    around, _, _ = maps.output.rpartition(".")
    for name, parameter in layer.get_submodule(around).named_parameters(prefix=around):
        if name.rpartition(".")[0] not in maps.attention and parameter.shape != (of.width,):
            raise ValueError(f"{name} {tuple(parameter.shape)} is not for each head alike: leave the attention whole")
    counters = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size")
    return _checked(layer, Units("KV groups of the attention", before, after, counters))


def _checked(layer: nn.Module, units: Units) -> Units:
    full = {path: shape(layer.get_submodule(path)) for path in {part.path for part in (*units.before, units.after)}}
    for path, expected in units.shapes(full, units.count).items():
        if full[path] != expected:
            raise ValueError(
                f"{path}: {units.count} {units.what} need (d_out, d_in) = {expected}, but the map has {full[path]}"
            )
    return units


def narrow(layer: nn.Module, units: Units, kept: Tensor) -> dict[str, Tensor]:
    """Leave out, in place, all units of a layer but `kept` (int64); its maps get modules and tensors of their own.

    Returns what was kept of each map: "<path>.rows" or "<path>.columns", and "<path>.shape", (d_out, d_in) before.
    """
    before = {f"{path}.rows": rows for path, rows in units.rows(kept).items()}
    recovery = before | {f"{units.after.path}.columns": units.columns(kept)}
    for name, index in list(recovery.items()):
        path, _, side = name.rpartition(".")
        linear = layer.get_submodule(path)
        recovery[f"{path}.shape"] = torch.tensor(shape(linear))
        weight, bias = linear.get_parameter("weight").detach(), _bias(linear)
        index = index.to(weight.device)
        weight = weight.index_select(int((side == "columns") != is_transposed(linear)), index)
        layer.set_submodule(path, _with(linear, weight, bias if bias is None or side == "columns" else bias[index]))
    _recount(layer, units, len(kept))
    return recovery


def fit(model: nn.Module, place: int, shapes: Mapping[str, Shape]) -> None:
    """Give the maps of a layer, in place, the shapes (d_out, d_in) that they were narrowed to; raises ValueError.

    The layer is as the model's configuration describes it. Its new maps hold no values yet, on the device they had.
    """
    layer = layers(model)[place]
    full = {path: shape(layer.get_submodule(path)) for path in linears(layer)}
    changed = {path for path in shapes if tuple(shapes[path]) != full.get(path)}
    if not changed:
        return
    maps = roles(model, place)
    if strange := sorted(changed - maps.attention - maps.mlp):
        raise ValueError(
            f"layer {place}, {strange[0]}: asked for (d_out, d_in) = {tuple(shapes[strange[0]])}, but only "
            f"{', '.join(sorted(maps.attention | maps.mlp))} can be narrower"
        )
    kinds = [channels(layer, maps)] if changed & maps.mlp else []
    kinds += [groups(layer, maps, heads(model))] if changed & maps.attention else []
    left = [(units, _left(units, full, {**full, **shapes})) for units in kinds]
    for units, kept in left:
        for path, (d_out, d_in) in units.shapes(full, kept).items():
            linear = layer.get_submodule(path)
            weight, bias = linear.get_parameter("weight").detach(), _bias(linear)
            empty = weight.new_empty((d_in, d_out) if is_transposed(linear) else (d_out, d_in))
            layer.set_submodule(path, _with(linear, empty, None if bias is None else bias.new_empty(d_out)))
        _recount(layer, units, kept)


def _left(units: Units, full: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> int:
    """Return how many units maps of these shapes have left; raises ValueError unless all agree."""
    path = units.after.path
    kept, rest = divmod(shapes[path][1], units.after.index.shape[1])
    if rest or not 0 < kept <= units.count:
        raise ValueError(
            f"{path}: (d_out, d_in) = {tuple(shapes[path])} does not leave a whole number, 1..{units.count}, of "
            f"{units.what} with {units.after.index.shape[1]} columns each"
        )
    for path, expected in units.shapes(full, kept).items():
        if tuple(shapes[path]) != expected:
            raise ValueError(
                f"{path}: (d_out, d_in) = {tuple(shapes[path])}, but {units.after.path} leaves {kept} {units.what}, "
                f"which makes it {expected}"
            )
    return kept


def _bias(linear: nn.Module) -> Tensor | None:
    bias = linear.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def _with(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a copy of a linear map with other tensors; nothing is allocated or drawn for it."""
    own: dict[int, nn.Parameter] = {}
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None:
            old = linear.get_parameter(name)
            own[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    twin = copy.deepcopy(linear, own)
    columns, rows = weight.shape if is_transposed(linear) else weight.shape[::-1]
    for name, size in {"in_features": columns, "out_features": rows, "nx": columns, "nf": rows}.items():
        if hasattr(twin, name):
            setattr(twin, name, size)
    return twin


def _recount(layer: nn.Module, units: Units, kept: int) -> None:
    around = layer.get_submodule(units.after.path.rpartition(".")[0])
    for name in units.counters:
        if hasattr(around, name):
            setattr(around, name, getattr(around, name) * kept // units.count)
