"""Another stack of layers for a model, of the same tensors."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from offsite.emulator.anatomy.structure import find, layers, text_config
from offsite.emulator.quiet import quiet

_NUMBERS = {"mlp_only_layers", "moe_layers"}  # lists of layers' numbers, not of a value for each
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # layers below are dense


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
    """Bring the depth and all that names layers by number in line: models are built by it, or read it when they run."""
    _renumber(config, sources)
    for name, value in list(vars(config).items()):
        per_layer = ("layer" in name or name.endswith("types")) and name not in _NUMBERS
        if per_layer and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, [value[source] for source in sources])
    config.num_hidden_layers = len(sources)


def _renumber(config: Any, sources: Sequence[int]) -> None:
    """Say of a mixture's places which are dense and which have experts, in the settings that families have for it."""
    dense = getattr(config, "mlp_only_layers", None)
    if isinstance(dense, list):
        step = getattr(config, "decoder_sparse_step", 1) or 1
        config.mlp_only_layers = [at for at, source in enumerate(sources) if source in dense or (source + 1) % step]
        config.decoder_sparse_step = 1
    sparse = getattr(config, "moe_layers", None)
    if isinstance(sparse, list):
        config.moe_layers = [at for at, source in enumerate(sources) if source in sparse]
    for name in _FIRST:
        if isinstance(first := getattr(config, name, None), int):
            setattr(config, name, sum(source < first for source in sources))


def refuse_mixture(model: nn.Module, sources: Sequence[int]) -> None:
    """Raise ValueError unless a model's configuration can describe the stack of these layers of it.

    Layers of a mixture differ: some are dense, others have experts. The model may have no weights.
    """
    stack = layers(model)
    kinds = [{name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} for layer in stack]
    if all(kind == kinds[0] for kind in kinds):
        return
    whole: Any = model.config
    config = type(whole).from_dict(whole.to_dict())
    follow(config.get_text_config(decoder=True), sources, len(stack))
    with quiet(), torch.device("meta"):
        other = layers(AutoModelForCausalLM.from_config(config))
    for place, source in enumerate(sources):
        if {name: tuple(tensor.shape) for name, tensor in other[place].state_dict().items()} != kinds[source]:
            raise ValueError(
                f"{type(model).__name__}: its layers are of several kinds, and its config.json cannot say that layer "
                f"{source} comes at place {place} of {len(sources)}; keep all layers (the builder whole)"
            )
