"""An adapter put into the base, or written down for others to put there."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from offsite.emulator.anatomy import find, is_transposed
from offsite.emulator.methods.base import Adapter, factors
from offsite.emulator.methods.lora import peft_config


def merge(model: nn.Module, adapter: Adapter, *, scale: float) -> None:
    """Add scale * B @ A to the weights of the base, in place and in fp32; raises ValueError if it does not fit."""
    pairs = factors(adapter)
    peft_config(model, pairs, scale)  # refuses what does not fit before anything is changed
    stack = find(model).layers
    with torch.no_grad():
        for place, (A, B) in pairs.items():
            module = stack[place.layer].get_submodule(place.path)
            weight = module.get_parameter("weight")
            change = scale * (B.to(weight.device, torch.float32) @ A.to(weight.device, torch.float32))
            weight.copy_(weight.float() + (change.T if is_transposed(module) else change))


def export_peft(directory: Path, adapter: Adapter, *, scale: float, model: nn.Module, base_name: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base."""
    pairs = factors(adapter)
    config = peft_config(model, pairs, scale)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(directory)
    # peft keeps the names in a set, whose order differs from process to process; equal adapters get equal files.
    file = directory / "adapter_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"target_modules": sorted(plain["target_modules"])}, indent=2, sort_keys=True))
    path = find(model).path
    tensors: Adapter = {}
    for place, (A, B) in pairs.items():
        name = f"base_model.model.{path}.{place.layer}.{place.path}"
        tensors |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
