"""A model loaded whole from its checkpoint: no parameter is random, no tensor unused.

transformers fills what a checkpoint lacks with random values, and leaves out what does not fit. Here both are refused.
"""

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.quiet import quiet
from offsite.emulator.zoo.files import one_line, weight_files

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
# Settings that name code to import or to download; a bundle that has one is refused by the sites.
CODE = {"auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
# What torch.compile, FSDP, checkpointing and DataParallel put into the names of what they wrap.
_WRAPPERS = (r"_orig_mod\.", r"_fsdp_wrapped_module\.", r"_checkpoint_wrapped_module\.", r"^module\.")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return which file of a folder's weights holds which tensor; raises ValueError if one stands in two."""
    held: dict[str, Path] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a safetensors file: {one_line(error)}") from None
        for name in names:
            if name in held:
                raise ValueError(f"{path}: {name} stands in {held[name].name} too; one of them is out of date")
            held[name] = path
    return held


def unwrapped(name: str) -> str:
    """Return a tensor's name without what known wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = re.sub(wrapper, "", name)
    return name


@cache
def _say(sentence: str) -> None:
    """Say once in a process what was taken otherwise than it stands in a folder."""
    log.warning(sentence)


def configuration(folder: Path) -> Any:
    """Read a model's configuration, without code or kernels it names; raises ValueError for what cannot be a base."""
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder / ADAPTER}: an adapter beside a model leaves open which of the two is meant; merge the adapter "
            "into the model, or move its files to another folder"
        )
    raw = _raw(folder)
    if "auto_map" in raw:
        _say(f"{folder / 'config.json'}: the code it names (auto_map) is not run; transformers' own is")
    if quantised := raw.get("quantization_config"):
        kind = quantised.get("quant_method", "a package") if isinstance(quantised, dict) else "a package"
        raise ValueError(
            f"{folder / 'config.json'}: the weights are packed by {str(kind)[:60]} (quantization_config), and "
            "a base needs plain ones: store them in bf16 or fp32, and let a builder such as quantised pack the emulator"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{folder}: not a causal language model that can be loaded: {one_line(error)}") from None
    return plain(config)


def plain(config: Any) -> Any:
    """Return a configuration, in place, that leaves it to transformers which code and which kernels compute."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name in CODE & {*vars(part or object)}:
            delattr(part, name)
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if getattr(part, name, None) is not None:
                setattr(part, name, None)
    return config


def load(folder: Path, dtype: torch.dtype | str, *, hollow: bool = False) -> Any:
    """Load a model whose every parameter is in its checkpoint and the other way round; raises ValueError.

    `hollow` leaves all weights on disk and gives a model on the device "meta" with the shapes and dtypes they would
    have: enough to tell whether the folder holds a whole model.
    """
    model, report = pretrained(folder, configuration(folder), dtype, device_map="meta" if hollow else None)
    _refuse_gaps(folder, report)
    if any(getattr(module, "is_causal", True) is False for layer in layers(model) for module in layer.modules()):
        raise ValueError(
            f"{folder / 'config.json'}: {type(model).__name__} is set up as an encoder, whose words see those after "
            "them; a causal language model is needed"
        )
    untie(model)
    first = f"{model.base_model_prefix}."
    for path in sorted({*folder.glob("*.safetensors")} - {*weight_files(folder)}):
        _say(f"{path}: not part of the model's weights, so it is ignored")
    for name in tensor_files(folder):
        if (plain := unwrapped(name).removeprefix(first if first + first in name else "")) != name:
            _say(f"{folder}: the tensors have names that a wrapper gave them; {name} is read as {plain}, and so on")
            break
    return model.eval()


def pretrained(
    folder: Path, config: Any, dtype: torch.dtype | str, *, device_map: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load a model as transformers does, and what it reports of tensors that do not fit; raises ValueError."""
    wrapped = any(unwrapped(name) != name for name in tensor_files(folder))
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,  # in so many words: the default asks on the terminal
                key_mapping=dict.fromkeys(_WRAPPERS, "") if wrapped else None,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # for the report: they are refused by name
            )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a causal language model that can be loaded: {one_line(error)}") from None
    # Or a model that is saved would get the wrappers' names back.
    model._weight_conversions = [one for one in model._weight_conversions if one.target_patterns != [""]]
    return model, report


def untie(model: Any) -> None:
    """Have the configuration say so if the checkpoint has tied weights that differ: transformers keeps them apart."""
    meant, are = model.get_expanded_tied_weights_keys(all_submodels=True), model.all_tied_weights_keys
    if apart := sorted(set(meant) - set(are)):
        if are:
            raise ValueError(
                f"{apart[0]} differs from {meant[apart[0]]}, to which config.json ties it, while {next(iter(are))} "
                "is tied; store one of the two, or set tie_word_embeddings to false"
            )
        _say(
            f"{model.name_or_path}: config.json ties {apart[0]} to {meant[apart[0]]}, but the two differ; both are kept"
        )
        for config in configurations(model.config):
            config.tie_word_embeddings = False


def configurations(config: Any) -> tuple[Any, Any]:
    """Return a model's configuration and that of its language model, often the same."""
    return config, config.get_text_config(decoder=True)


def refuse_infinite(folder: Path) -> None:
    """Read every tensor of a checkpoint once; raises ValueError that names the first with a NaN or an infinity."""
    for name, path in tensor_files(folder).items():
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not finite(tensor):
            raise ValueError(f"{path}: {name} holds values that are not finite (NaN or infinity); it cannot be a base")


def finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite; of most tensors the sum tells it, in one pass without a copy."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.float().isfinite().all())


def _refuse_gaps(folder: Path, report: dict[str, Any]) -> None:
    """Raise ValueError that names a tensor without a place in the model, or a parameter without a tensor."""
    fault = f"{folder}: the weights are not those of the model that config.json describes"
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        have = f", but {surplus[0]}" if surplus else ""
        raise ValueError(
            f"{fault}: they have no {missing[0]}{_more(missing)}{have}; without them it would be random: store the "
            "whole model, under transformers' own names"
        )
    if surplus:
        raise ValueError(f"{fault}: it has no {surplus[0]}{_more(surplus)}; correct config.json, or leave them out")
    for name, stored, meant in sorted(report["mismatched_keys"]):
        raise ValueError(f"{fault}: {name} is {tuple(stored)} in the weights and {tuple(meant)} by config.json")
    if report["error_msgs"]:
        raise ValueError(f"{fault}: {one_line(report['error_msgs'][0])}")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _raw(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a table of settings, found {type(raw).__name__}")
    return raw
