"""How much of the base a site can read off an emulator."""

from dataclasses import dataclass

from torch import Tensor, nn

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders.base import Draft
from offsite.emulator.formats.packed import PackedLinear


@dataclass(frozen=True)
class Disclosure:
    """Numbers of parameters, each counted once however many places use it."""

    verbatim: int  # the emulator holds the base's own value
    lossy: int  # it holds the value rounded to few bits
    of: int  # the base has


def disclosed(draft: Draft) -> Disclosure:
    """Count which of the base's parameters an emulator holds.

    The base's own tensors are verbatim wherever they are, and so is what is not a tensor of the base but was not tuned
    either: kept rows and columns. A packed map counts with the entries of the matrix it stands for. What the owner
    tuned is neither.
    """
    own = {_memory(parameter) for parameter in draft.base.parameters()}
    shared, stack = draft.outline.shared, layers(draft.model)
    tuned = {
        id(module)
        for place, layer in enumerate(stack)
        if shared.get(place, place) in draft.tuned
        for module in layer.modules()
    }
    verbatim = lossy = 0
    seen: set[object] = set()
    key: object
    for module in draft.model.modules():
        parts: set[str] = set()
        if isinstance(module, PackedLinear):
            parts = {*module.parts}
            key = tuple(_memory(part) for part in module.parts.values())
            if key not in seen and id(module) not in tuned:
                lossy += module.out_features * module.in_features
            seen.add(key)
        for name, parameter in module.named_parameters(recurse=False):
            key = _memory(parameter)
            if name not in parts and key not in seen and (key in own or id(module) not in tuned):
                verbatim += parameter.numel()
            seen.add(key)
    return Disclosure(verbatim, lossy, count(draft.base))


def count(model: nn.Module) -> int:
    """Count the parameters a model computes with: shared ones once, packed maps by the matrix they stand for."""
    sizes: dict[object, int] = {}
    for module in model.modules():
        parts: set[str] = set()
        if isinstance(module, PackedLinear):
            parts = {*module.parts}
            sizes[tuple(_memory(part) for part in module.parts.values())] = module.out_features * module.in_features
        for name, parameter in module.named_parameters(recurse=False):
            if name not in parts:
                sizes[_memory(parameter)] = parameter.numel()
    return sum(sizes.values())


def _memory(tensor: Tensor) -> object:
    """Tell where a tensor lies; one whose values are still on disk is itself."""
    return ("meta", id(tensor)) if tensor.is_meta else tensor.data_ptr()
