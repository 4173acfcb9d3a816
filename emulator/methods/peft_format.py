"""Low-rank adapters as peft has them: attached to a model, and as files that others load.

Beside `peft_hub`, which has peft's other types, the only file that opens peft.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import nn

from offsite.emulator.anatomy.structure import find, is_transposed, linears, shape
from offsite.emulator.methods.base import Adapter, Factors, Place, factors
from offsite.emulator.methods.targets import Modules, targets
from offsite.emulator.quiet import quiet

N = TypeVar("N", int, float)
_ADAPTER = "default"  # peft's own name for the only adapter


def attach(model: nn.Module, places: Mapping[int, int], adapter: Adapter, scales: Mapping[Place, float]) -> nn.Module:
    """Wrap the adapter's maps with peft, in place, at the ranks it has; raises ValueError if it does not fit.

    `scales` says by which factor each map's product is multiplied, here as in the other functions.
    """
    pairs = factors(adapter)
    if {place.layer for place in pairs} != set(places.values()):
        ids = sorted({place.layer for place in pairs})
        raise ValueError(f"the adapter is for layers {ids}, but those that train are {sorted(places.values())}")
    position = {layer: at for at, layer in places.items()}
    at = {place: Place(position[place.layer], place.path) for place in pairs}
    config = config_of(model, {at[p]: pair for p, pair in pairs.items()}, {at[p]: scales[p] for p in pairs})
    with quiet():
        attached: nn.Module = get_peft_model(model, config)
    parameters = live(attached, places)
    if parameters.keys() != adapter.keys():
        raise ValueError(f"the model does not take the adapter's keys {sorted(parameters.keys() ^ adapter.keys())[:3]}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(adapter[key])
    return attached


def live(model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
    """Return the live parameters of an attached model by adapter key."""
    stack = find(model).layers
    parameters: dict[str, nn.Parameter] = {}
    for position, layer in places.items():
        for path, module in stack[position].named_modules():
            if isinstance(module, LoraLayer):
                wrapped: Any = module
                parameters[Place(layer, path).key("A")] = wrapped.lora_A[_ADAPTER].weight
                parameters[Place(layer, path).key("B")] = wrapped.lora_B[_ADAPTER].weight
    return parameters


def write(
    directory: Path,
    pairs: Mapping[Place, Factors],
    scales: Mapping[Place, float],
    *,
    base: nn.Module,
    base_name: str,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base."""
    config = config_of(base, pairs, scales)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    save_config(directory, config)
    path = find(base).path
    tensors: Adapter = {}
    for place, (A, B) in pairs.items():
        name = f"base_model.model.{path}.{place.layer}.{place.path}"
        tensors |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def save_config(directory: Path, config: Any) -> None:
    """Write `adapter_config.json`; equal adapters get equal files, though peft keeps names in sets."""
    config.save_pretrained(directory)
    file = directory / "adapter_config.json"
    document = json.loads(file.read_text())
    document["target_modules"] = sorted(document["target_modules"])
    file.write_text(json.dumps(document, indent=2, sort_keys=True))


def is_lora(directory: Path) -> bool:
    """Tell whether a folder's adapter is of the type that `write` writes, and not another one of peft's."""
    document = json.loads((directory / "adapter_config.json").read_text())
    return bool(document.get("peft_type") == PeftType.LORA)


def read(directory: Path) -> tuple[Adapter, dict[Place, float]]:
    """Read an adapter back that `write` wrote, and its scales."""
    config = LoraConfig.from_pretrained(directory)
    adapter: Adapter = {}
    scales: dict[Place, float] = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        whole, layer, path, part = re.fullmatch(r"(.*?\.(\d+)\.(.+))\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        place = Place(int(layer), path)
        adapter[place.key(part)] = tensor
        rank, alpha = (
            pattern.get(get_pattern_key(pattern, whole), usual)
            for pattern, usual in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        scales[place] = alpha / rank
    return adapter, scales


def maps(model: nn.Module, places: Mapping[int, int], modules: Modules, *, method: str) -> dict[int, list[str]]:
    """Return the paths of the maps to adapt at each place; raises ValueError if a layer, or an ending, has none."""
    stack = find(model).layers
    listed = targets(model, places, modules)
    every = {at: linears(stack[at]) for at in places}
    taken = experts(model, every)
    if modules == "all-linear":
        listed = {at: [path for path in paths if path not in taken] for at, paths in listed.items()}
    elif lost := sorted(taken & {path for paths in listed.values() for path in paths}):
        raise ValueError(f"peft takes {lost[0]} of this family for a part of its experts; leave it out of modules")
    for at, paths in listed.items():
        if not paths:
            raise ValueError(
                f"layer {places[at]} has no linear map for {method}; name some as modules (it has "
                f"{', '.join(every[at]) or 'none'}), or train it whole, with the method blocks"
            )
    return listed


def experts(model: Any, maps: Mapping[int, list[str]]) -> set[str]:
    """Return the paths that peft would take for those of experts, by names that a mixture's old checkpoints had."""
    paths = {path for listed in maps.values() for path in listed}
    config = LoraConfig(target_modules=paths)
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    return paths - set(config.target_modules or ())


def config_of(model: nn.Module, pairs: Mapping[Place, Factors], scales: Mapping[Place, float]) -> Any:
    """Return peft's configuration of adapters at a model's own layer numbers; raises ValueError if they do not fit."""
    anatomy = find(model)
    transposed = False
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for place, pair in pairs.items():
        if not 0 <= place.layer < len(anatomy.layers):
            raise ValueError(f"the adapter is for layer {place.layer}, the model has {len(anatomy.layers)} layers")
        layer = anatomy.layers[place.layer]
        if place.path not in linears(layer):
            raise ValueError(f"the layers have no linear map {place.path!r}; there are {', '.join(linears(layer))}")
        module = layer.get_submodule(place.path)
        if shape(module) != (pair.B.shape[0], pair.A.shape[1]):
            raise ValueError(
                f"{place.key('A')!r}: A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)} do not fit a linear map "
                f"of (d_out, d_in) = {shape(module)}"
            )
        transposed = transposed or is_transposed(module)
        name = f"{anatomy.path}.{place.layer}.{place.path}"
        ranks[name] = pair.rank
        alphas[name] = scales[place] * pair.rank  # of which peft makes the scale again, by dividing
    rank, alpha = max(ranks.values()), max(alphas.values())
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
        fan_in_fan_out=transposed,
    )


def _pattern(values: Mapping[str, N], usual: N) -> dict[str, N]:
    """Return those values that are not the usual one, by peft's pattern for a name."""
    return {re.escape(name): value for name, value in values.items() if value != usual}
