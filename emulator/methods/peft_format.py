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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find, is_transposed, linears, shape
from offsite.emulator.methods.base import Adapter, Factors, Place, factors
from offsite.emulator.methods.maps import linear_at, moved, wrapped
from offsite.emulator.methods.targets import Modules, targets
from offsite.emulator.quiet import quiet

N = TypeVar("N", int, float)
_ADAPTER = "default"  # peft's own name for the only adapter
_FIRST = "first"  # and ours for one beside it, which does not train


def attach(
    model: nn.Module,
    places: Mapping[int, int],
    adapter: Adapter,
    scales: Mapping[Place, float],
    *,
    first: Adapter | None = None,
) -> nn.Module:
    """Wrap the adapter's maps with peft, in place, at the ranks it has; raises ValueError if it does not fit.

    `scales` says by which factor each map's product is multiplied, here as in the other functions; `first` is an
    adapter of the same maps that is taken off again and does not train.
    """
    pairs = factors(adapter)
    at = moved(pairs, places)
    config = config_of(model, {at[p]: pair for p, pair in pairs.items()}, {at[p]: scales[p] for p in pairs})
    taken = factors(first) if first else {}
    away = (
        config_of(model, {at[p]: pair for p, pair in taken.items()}, {at[p]: -scales[p] for p in taken})
        if taken
        else None
    )
    with quiet():
        attached: Any = get_peft_model(model, config)
        if away:
            attached.add_adapter(_FIRST, away)
            attached.base_model.set_adapter([_ADAPTER, _FIRST])
    _load(live(attached, places), adapter)
    if first:
        _load(_freeze(attached, places), first)
    result: nn.Module = attached
    return result


def _freeze(model: nn.Module, places: Mapping[int, int]) -> dict[str, Tensor]:
    """Make buffers of what is taken off, and return them: as parameters, an engine might train or scatter them."""
    for module in wrapped(model, places, LoraLayer).values():
        for part in (module.lora_A[_FIRST], module.lora_B[_FIRST]):
            weight = part.weight.detach()
            del part.weight
            part.register_buffer("weight", weight)
    return fixed(model, places)


def _load(places: Mapping[str, Tensor], adapter: Adapter) -> None:
    if odd := sorted(places.keys() ^ adapter.keys()):
        raise ValueError(f"the model does not take the adapter's keys {odd[:3]}")
    with torch.no_grad():
        for key, tensor in places.items():
            tensor.copy_(adapter[key])


def live(model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
    """Return the live parameters of an attached model by adapter key."""
    return _factors(model, places, _ADAPTER)


def fixed(model: nn.Module, places: Mapping[int, int]) -> dict[str, Tensor]:
    """Return what is taken off of an attached model, by the keys of what trains; nothing, where nothing is."""
    return _factors(model, places, _FIRST)


def _factors(model: nn.Module, places: Mapping[int, int], name: str) -> dict[str, Any]:
    return {
        place.key(part): of[name].weight
        for place, module in wrapped(model, places, LoraLayer).items()
        for part, of in (("A", module.lora_A), ("B", module.lora_B))
        if name in of
    }


def write(
    directory: Path,
    pairs: Mapping[Place, Factors],
    scales: Mapping[Place, float],
    *,
    base: nn.Module,
    base_name: str,
    lengths: Mapping[Place, Tensor] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base.

    With the lengths (d_out,) that the rows of W are to have it is DoRA, and LoRA without.
    """
    config = config_of(base, pairs, scales)
    config.use_dora = lengths is not None
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    save_config(directory, config)
    path = find(base).path
    tensors: Adapter = {}
    for place, (A, B) in pairs.items():
        name = f"base_model.model.{path}.{place.layer}.{place.path}"
        tensors |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
        if lengths:
            tensors[f"{name}.lora_magnitude_vector"] = lengths[place]
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def save_config(directory: Path, config: Any) -> None:
    """Write `adapter_config.json`; equal adapters get equal files, though peft keeps names in sets."""
    config.save_pretrained(directory)
    file = directory / "adapter_config.json"
    document = json.loads(file.read_text())
    document["target_modules"] = sorted(document["target_modules"])
    file.write_text(json.dumps(document, indent=2, sort_keys=True))


def is_lora(directory: Path) -> bool:
    """Tell whether a folder's adapter is LoRA, which `read` reads, and not DoRA or another type of peft's."""
    document = json.loads((directory / "adapter_config.json").read_text())
    return bool(document.get("peft_type") == PeftType.LORA and not document.get("use_dora"))


def read(directory: Path) -> tuple[Adapter, dict[Place, float]]:
    """Read LoRA back that `write` wrote, and its scales."""
    config = LoraConfig.from_pretrained(directory)
    adapter: Adapter = {}
    scales: dict[Place, float] = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        whole, place, part = _parsed(name)
        adapter[place.key(part)] = tensor
        rank, alpha = (
            pattern.get(get_pattern_key(pattern, whole), usual)
            for pattern, usual in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
        )
        scales[place] = alpha / rank
    return adapter, scales


def paths(directory: Path) -> dict[Place, str]:
    """Return by map of a published LoRA its path in the base, such as "model.layers.3.mlp.up_proj"."""
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        parsed = [_parsed(name) for name in file.keys()]  # noqa: SIM118 - it is no mapping
    return {place: whole.removeprefix("base_model.model.") for whole, place, _ in parsed}


def ranks(directory: Path) -> dict[Place, int]:
    """Return by map of a published LoRA its rank; no values are read."""
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    parsed = {_parsed(name)[1:]: shape for name, shape in shapes.items()}
    return {place: shape[0] for (place, part), shape in parsed.items() if part == "A"}


def _parsed(name: str) -> tuple[str, Place, str]:
    """Take a tensor's name apart: its map as peft names it, and as we do, and which of the factors it is."""
    whole, layer, path, part = re.fullmatch(r"(.*?\.(\d+)\.(.+))\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
    return whole, Place(int(layer), path), part


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
        module = linear_at(model, place)
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
        task_type=task(model),
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
        fan_in_fan_out=transposed,
    )


def task(model: nn.Module) -> str | None:
    """Return peft's name of what a model does, if its wrapper has to know: of those that write text."""
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None


def _pattern(values: Mapping[str, N], usual: N) -> dict[str, N]:
    """Return those values that are not the usual one, by peft's pattern for a name."""
    return {re.escape(name): value for name, value in values.items() if value != usual}
