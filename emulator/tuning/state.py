"""The state of a training as a file: it goes on from it after a kill, and ends with the bytes of an undisturbed one."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from offsite.emulator.modality import Sample

FORMAT = 2  # of the file, so that one of an earlier kind is refused


def identity(parameters: Mapping[str, nn.Parameter], samples: Sequence[Sample], schedule: object) -> str:
    """Describe the work: its schedule (as plain data), its text, and the parameters it starts from."""
    start, text = hashlib.sha256(), hashlib.sha256()
    for name, parameter in parameters.items():
        start.update(f"{name} {tuple(parameter.shape)}".encode())
        start.update(parameter.detach().cpu().contiguous().numpy().data)
    for one in samples:
        text.update(repr(one).encode())
    described = {"format": FORMAT, "schedule": schedule, "text": text.hexdigest(), "start": start.hexdigest()}
    return json.dumps(described, sort_keys=True)


def save(
    state: Path,
    work: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    losses: Sequence[float],
    kept: Mapping[str, Tensor],
) -> None:
    """Write the whole state, so that at any moment the file is absent or whole."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    tensors |= {f"kept.{name}": tensor for name, tensor in kept.items()}
    for name, parameter in parameters.items():
        tensors[f"value.{name}"] = parameter.detach()
        tensors |= {f"state.{part}.{name}": tensor for part, tensor in optimizer.state[parameter].items()}
    state.parent.mkdir(parents=True, exist_ok=True)
    partial = state.with_name(f"{state.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"work": work})
    os.replace(partial, state)


@torch.no_grad()
def resume(
    state: Path,
    work: str,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    kept: Mapping[str, Tensor],
) -> list[float]:
    """Read parameters, the optimiser's state and what was kept back; return the losses of the steps that are done.

    Raises ValueError if the file is of other work, or no state.
    """
    try:
        with safe_open(state, "pt") as file:
            if (file.metadata() or {}).get("work") != work:
                raise ValueError(f"{state} is of other work: another model, text or schedule; remove it to start anew")
            losses: list[float] = file.get_tensor("losses").tolist()
            for name, tensor in kept.items():
                tensor.copy_(file.get_tensor(f"kept.{name}"))
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"value.{name}"))
            for key in file.keys():
                kind, _, rest = key.partition(".")
                if kind == "state":
                    part, _, name = rest.partition(".")
                    parameter = parameters[name]
                    optimizer.state[parameter][part] = file.get_tensor(key).to(parameter.device)
    except SafetensorError as error:
        raise ValueError(f"{state} is not a state of tuning: {error}; remove it to start anew") from None
    return losses
