"""The precisions of frozen weights by name, and which of them a machine computes in fastest."""

from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MULTIPLIES_BF16 = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")  # as torch names what processors can do


def fastest(device: torch.device) -> Precision:
    """Return bf16 where the device multiplies it in hardware; emulated, it takes eight times as long as fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if any(able.get(name) for name in _MULTIPLIES_BF16) else "fp32"


def quicken(model: nn.Module) -> torch.dtype:
    """Turn a model to fp32, in place, if its processor emulates the dtype it has; return that dtype.

    fp32 holds 16-bit values exactly: cast back, what was not trained has the same bytes.
    """
    first = next(model.parameters())
    stored = first.dtype
    if first.device.type == "cpu" and stored != DTYPES[fastest(first.device)]:
        model.float()
    return stored
