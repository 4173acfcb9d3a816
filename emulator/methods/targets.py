"""Which linear maps a method trains: those that its setting `modules` names, of the layers that train."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import nn

from offsite.emulator.anatomy.roles import roles
from offsite.emulator.anatomy.structure import adaptable, find, linears

Modules: TypeAlias = Literal["all-linear"] | tuple[str, ...]  # or the endings of the maps' paths
Outputs: TypeAlias = Literal["outputs"]  # those that attention and MLP end in
MlpOutput: TypeAlias = Literal["mlp-output"]  # the one that the MLP ends in
Attention: TypeAlias = Literal["attention"]  # all of the attention's


def targets(
    model: nn.Module, places: Mapping[int, int], modules: Modules | Outputs | MlpOutput | Attention
) -> dict[int, list[str]]:
    """Return the paths of the maps at each place, perhaps none.

    Raises ValueError for an ending that no map has, and for roles where the family's are not known.
    """
    stack = find(model).layers
    if modules == "outputs":
        return {at: [(its := roles(model, at)).output, its.mlp_out] for at in places}
    if modules == "mlp-output":
        return {at: [roles(model, at).mlp_out] for at in places}
    if modules == "attention":
        return {at: [path for path in linears(stack[at]) if path in roles(model, at).attention] for at in places}
    if modules == "all-linear":
        return {at: adaptable(stack[at]) for at in places}
    every = {at: linears(stack[at]) for at in places}
    known = dict.fromkeys(path for paths in every.values() for path in paths)
    for ending in modules:
        if not any(ends_in(path, ending) for path in known):
            raise ValueError(f"no linear map of a layer ends in {ending!r}; there are {', '.join(known)}")
    return {at: [path for path in paths if any(ends_in(path, end) for end in modules)] for at, paths in every.items()}


def ends_in(path: str, ending: str) -> bool:
    """Tell whether a path ends in whole parts of another: "mlp.up_proj" in "up_proj", but not in "proj"."""
    return f".{path}".endswith(f".{ending}")
