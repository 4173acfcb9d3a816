"""How much of the base a site can read off an emulator."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.evaluation.portion import Portion
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.outline import Draft


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
    held = list(_held(draft))
    return Disclosure(sum(one[1] for one in held), sum(one[2] for one in held), count(draft.base))


def by_layer(draft: Draft) -> dict[str, Portion]:
    """Count the same for each of the base's layers that the emulator has; "" is what is in no layer of the base."""
    sums: dict[str, tuple[int, int]] = {}
    for layer, verbatim, lossy, tuned in _held(draft):  # few steps of tuning hide nothing
        before = sums.get(layer, (0, 0))
        sums[layer] = (before[0] + verbatim, before[1] + lossy + tuned)
    sizes = base_sizes(draft.base)
    return {
        layer: Portion(*sums.get(layer, (0, 0)), size, _part(draft, layer) if layer else "")
        for layer, size in sizes.items()
    }


def base_sizes(base: nn.Module) -> dict[str, int]:
    """Count the parameters of each layer of a base; "" is what is in none."""
    sizes = {str(index): count(layer) for index, layer in enumerate(layers(base))}
    return sizes | {"": count(base) - sum(sizes.values())}


def _part(draft: Draft, layer: str) -> str:
    """Name the rows and columns that a narrowed layer keeps; empty for one that keeps all."""
    names = [name for name in sorted(draft.recovery) if name.startswith(f"{layer}.")]
    kept = [name for name in names if name.endswith((".rows", ".columns"))]
    whole = hashlib.sha256()
    for name in kept:
        whole.update(name.encode() + draft.recovery[name].cpu().numpy().tobytes())
    return whole.hexdigest()[:16] if kept else ""


def _held(draft: Draft) -> Iterator[tuple[str, int, int, int]]:
    """Yield, for each tensor of an emulator, the base's layer and how many are verbatim, in few bits, and tuned."""
    own = {_memory(parameter) for parameter in draft.base.parameters()}
    shared, stack = draft.outline.shared, layers(draft.model)
    layer_of = {
        id(module): str(draft.outline.layers[shared.get(place, place)])
        for place, layer in enumerate(stack)
        for module in layer.modules()
    }
    tuned = {
        id(module)
        for place, layer in enumerate(stack)
        if shared.get(place, place) in draft.tuned
        for module in layer.modules()
    }
    seen: set[object] = set()
    key: object
    for module in draft.model.modules():
        parts: set[str] = set()
        if isinstance(module, PackedLinear):
            parts = {*module.parts}
            key = tuple(_memory(part) for part in module.parts.values())
            if key not in seen:
                entries = module.out_features * module.in_features
                yield layer_of.get(id(module), ""), 0, *((0, entries) if id(module) in tuned else (entries, 0))
            seen.add(key)
        for name, parameter in module.named_parameters(recurse=False):
            key = _memory(parameter)
            if name not in parts and key not in seen:
                entries, verbatim = parameter.numel(), key in own or id(module) not in tuned
                yield layer_of.get(id(module), ""), *((entries, 0, 0) if verbatim else (0, 0, entries))
            seen.add(key)


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
