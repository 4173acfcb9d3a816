"""Another stack of layers for a model, of the same tensors."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from offsite.emulator.anatomy.structure import find, text_config


def restack(model: nn.Module, positions: Sequence[int], shared: Mapping[int, int] | None = None) -> nn.Module:
    """Return a model whose layer p is the given model's layer `positions[p]`; tensors are shared, nothing is changed.

    `shared` maps a place in the new stack to another whose parameters it uses instead of its own layer's. Every place
    has a module of its own, so that it has its own slot in the key-value cache. Raises ValueError.
    """
    anatomy = find(model)
    depth = len(anatomy.layers)
    shared = shared or {}
    if not positions or not all(0 <= position < depth for position in positions):
        raise ValueError(f"positions must name layers in 0..{depth - 1}, got {list(positions)}")
    if not all(0 <= at < len(positions) and 0 <= source < len(positions) for at, source in shared.items()):
        raise ValueError(f"shared must map places in 0..{len(positions) - 1}, got {dict(shared)}")
    sources = [positions[shared.get(place, place)] for place in range(len(positions))]
    config = text_config(model)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and sources != list(range(depth)):
        raise ValueError("this model scales attention by the layer's number; its layers cannot be moved")

    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, dict(tensors))
    stack = find(twin)
    twin_config = text_config(twin)
    keep: dict[int, Any] = {**tensors, id(twin_config): twin_config, id(twin.config): twin.config}
    blocks = [copy.deepcopy(stack.layers[source], dict(keep)) for source in sources]
    for place, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]  # a plain int, which torch's stub does not foresee
    twin.set_submodule(stack.path, nn.ModuleList(blocks))
    follow(twin_config, sources, depth)
    return twin


def follow(config: Any, sources: Sequence[int], depth: int) -> None:
    """Bring the depth and every list with one entry per layer in line: models read them in their forward pass."""
    for name, value in list(vars(config).items()):
        per_layer = "layer" in name or name.endswith("types")
        if per_layer and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, [value[source] for source in sources])
    config.num_hidden_layers = len(sources)
