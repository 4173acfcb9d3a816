"""Where an adapter's maps are in a model: `Place` has the base's layer numbers, a model's layers have its own."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from offsite.emulator.anatomy.structure import find, linears
from offsite.emulator.methods.base import Place

M = TypeVar("M", bound=nn.Module)


def moved(maps: Iterable[Place], places: Mapping[int, int]) -> dict[Place, Place]:
    """Return for each map of an adapter its place by the model's own layer numbers.

    Raises ValueError unless it has maps of all layers that train, and of no others.
    """
    position, maps = {layer: at for at, layer in places.items()}, list(maps)
    if (ids := {place.layer for place in maps}) != position.keys():
        raise ValueError(f"the adapter is for layers {sorted(ids)}, but those that train are {sorted(position)}")
    return {place: Place(position[place.layer], place.path) for place in maps}


def linear_at(model: nn.Module, place: Place) -> nn.Module:
    """Return the linear map at a place by the model's own layer numbers; raises ValueError if there is none."""
    stack = find(model).layers
    if not 0 <= place.layer < len(stack):
        raise ValueError(f"the adapter is for layer {place.layer}, the model has {len(stack)} layers")
    if place.path not in (paths := linears(stack[place.layer])):
        raise ValueError(f"the layers have no linear map {place.path!r}; there are {', '.join(paths)}")
    return stack[place.layer].get_submodule(place.path)


def wrapped(model: nn.Module, places: Mapping[int, int], kind: type[M]) -> dict[Place, M]:
    """Return the modules of a kind in the layers that train, by the base's layer numbers."""
    stack = find(model).layers
    return {
        Place(layer, path): module
        for at, layer in places.items()
        for path, module in stack[at].named_modules()
        if isinstance(module, kind)
    }
