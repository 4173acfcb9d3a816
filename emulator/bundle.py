"""An emulator as files: an ordinary model folder of its distinct layers, from which the stack is built again."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from offsite.emulator.builders.base import Outline
from offsite.emulator.quiet import quiet
from offsite.emulator.stack import restack

_CODE = {"auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}


def save(model: nn.Module, tokenizer: Any, directory: Path, *, outline: Outline) -> None:
    """Write an emulator: `config.json`, `model.safetensors` with shared tensors once, and the tokenizer's files."""
    distinct: Any = restack(model, _own(outline))
    with quiet():
        distinct.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def load(directory: Path, *, outline: Outline, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    """Read an emulator and its tokenizer; raises ValueError if the folder asks for code or lacks a tensor.

    `dtype` "auto" keeps the stored one.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: not a model folder: config.json is missing")
    _refuse_code(directory)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory}: not a model folder: {error}") from None
    if faults := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]):
        raise ValueError(f"{directory}: the weights do not fill the model its config.json describes: {faults[0]}")
    index = {place: stored for stored, place in enumerate(_own(outline))}
    places = [index[outline.shared.get(place, place)] for place in range(len(outline.layers))]
    return restack(model, places), tokenizer


def _own(outline: Outline) -> list[int]:
    """Return the places that have parameters of their own."""
    return [place for place in range(len(outline.layers)) if place not in outline.shared]


def _refuse_code(directory: Path) -> None:
    """Refuse what would make the loader import or download something that the folder names."""
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory}: it holds an adapter_config.json, which names another model to load; remove it")

    for name in ("config.json", "tokenizer_config.json"):

        def check(found: dict[str, Any], name: str = name) -> dict[str, Any]:
            if code := sorted(_CODE.intersection(found)):
                raise ValueError(f"{directory / name}: {code[0]!r} names code to load; a bundle carries none")
            return found

        if (directory / name).exists():
            json.loads((directory / name).read_text(encoding="utf-8"), object_hook=check)
