"""LoRA of one rank, which servers take: vLLM wants one for all maps, and llama.cpp one scale.

A run publishes LoRA as peft has it, each map at the rank of what the sites' products add up to.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from offsite.emulator.methods import own_format, peft_format
from offsite.emulator.methods.base import Factors, factors
from offsite.kernels.low_rank import decompose, split

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "base_model.model."  # what peft writes before a module's path


@dataclass(frozen=True)
class Uniform:
    """LoRA of one rank and of scale one, by the path of the map that each pair changes."""

    pairs: dict[str, Factors]
    rank: int
    lost: float  # of the norm of all changes, what the rank leaves out, as a share
    config: dict[str, Any]


def read(directory: Path, rank: int = 0) -> Uniform:
    """Read published LoRA at one rank: the best approximation of each product where that has more, zeros where less.

    0 is the largest that the adapter has, which loses nothing. Raises ValueError if the folder has no LoRA, or for a
    rank that is none.
    """
    if not (directory / CONFIG).is_file() or not peft_format.is_lora(directory):
        what = f"that of {own_format.DOCUMENT}" if (directory / own_format.DOCUMENT).is_file() else "another type"
        raise ValueError(f"{directory}: expected LoRA in peft's format, which this is not; its adapter is {what}")
    if rank < 0:
        raise ValueError(f"rank must be at least 1, or 0 for all that there is, got {rank}")
    adapter, scales = peft_format.read(directory)
    own, names = factors(adapter), peft_format.paths(directory)
    rank = rank or max(pair.rank for pair in own.values())
    pairs, lost, whole = dict[str, Factors](), 0.0, 0.0
    for place, (A, B) in own.items():
        product = B.float() * scales[place], A.float()
        svd = decompose(product)
        energies = svd[1].square()
        whole, lost = whole + float(energies.sum()), lost + float(energies[rank:].sum())
        left, right = split(product, rank, svd=svd)[0] if A.shape[0] > rank else product
        pairs[names[place]] = Factors(_padded(right, rank, 0), _padded(left, rank, 1))
    return Uniform(pairs, rank, math.sqrt(lost / whole) if whole else 0.0, json.loads((directory / CONFIG).read_text()))


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - factor.shape[axis]
    return torch.nn.functional.pad(factor, (0, missing) if axis else (0, 0, 0, missing)).contiguous()


def write(out: Path, adapter: Uniform) -> None:
    """Write it in peft's format without patterns, as vLLM takes it where its `max_lora_rank` is no smaller."""
    out.mkdir(parents=True)
    own = {"r": adapter.rank, "lora_alpha": adapter.rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    (out / CONFIG).write_text(json.dumps(adapter.config | own, indent=2, sort_keys=True))
    tensors = {
        f"{MODULE}{name}.lora_{part}.weight": factor
        for name, pair in adapter.pairs.items()
        for part, factor in (("A", pair.A), ("B", pair.B))
    }
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
