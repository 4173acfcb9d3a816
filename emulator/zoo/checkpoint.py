"""A model folder read layer by layer, for models that do not fit into memory."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.emulator.anatomy.stack import follow
from offsite.emulator.anatomy.structure import find
from offsite.emulator.precision import quicken
from offsite.emulator.quiet import quiet


def skeleton(config: Any, *, dtype: Any) -> Any:
    """Return a model without weights: parameters on the device "meta", buffers that are computed where they belong."""
    with quiet(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name, each read when it is asked for and not kept."""

    folder: Path
    files: dict[str, Path]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read which file holds which tensor; raises ValueError."""
        files: dict[str, Path] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
        return cls(folder, files)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by name; files are opened anew each time, so that what was read before can be let go."""
        found: dict[str, Tensor] = {}
        for name in names:
            with safe_open(self.files[name], framework="pt") as file:
                found[name] = file.get_tensor(name)
        return found

    def layer(self, model: nn.Module, number: int) -> dict[str, Tensor]:
        """Read one layer's tensors by their names inside it; raises ValueError if there is one missing."""
        prefix = self._prefix(model)
        wanted = list(find(model).layers[number].state_dict())
        if missing := [name for name in wanted if f"{prefix}{number}.{name}" not in self.files]:
            raise ValueError(
                f"{self.folder}: no tensor {prefix}{number}.{missing[0]}, so its layers cannot be read one at a time; "
                "load and save the model with this transformers once"
            )
        found = self.read(f"{prefix}{number}.{name}" for name in wanted)
        return dict(zip(wanted, found.values(), strict=True))

    def stream(self) -> tuple[Any, torch.dtype]:
        """Return the model with its layers left on disk, and the dtype they have there.

        Each is read when the forward pass comes to it, and computes in what this machine is fastest in. Raises
        ValueError if the files name the layers' tensors otherwise than the model does.
        """
        with quiet():
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
            hollow = copy.deepcopy(config)
            follow(hollow.get_text_config(decoder=True), [], hollow.get_text_config(decoder=True).num_hidden_layers)
            # Without layers, for transformers knows under which names old files have the other tensors.
            rest = AutoModelForCausalLM.from_pretrained(
                self.folder, config=hollow, dtype="auto", local_files_only=True, use_safetensors=True
            )
        model = skeleton(config, dtype=rest.dtype)
        stored = quicken(rest)
        if rest.dtype != stored:
            model.float()  # with its buffers, which came to be in what is stored
        anatomy = find(model)
        model.load_state_dict(rest.state_dict(), strict=False, assign=True)
        model.tie_weights()
        prefix = self._prefix(model)
        index = {
            f"{anatomy.path}.{number}.{name}": {
                "safetensors_file": str(self.files[f"{prefix}{number}.{name}"]),
                "weight_name": f"{prefix}{number}.{name}",
            }
            for number, layer in enumerate(anatomy.layers)
            for name in layer.state_dict()
        }
        with quiet():
            streamed = dispatch_model(
                model,
                _places(model, anatomy.path),
                main_device="cpu",
                offload_index=index,
                offload_dir=self.folder,  # required, but not used: the index names the files
                force_hooks=True,
            )
        return streamed, stored

    def _prefix(self, model: Any) -> str:
        """Return what precedes a layer's number in the files: with or without the model's own first name."""
        path = find(model).path
        short = path.removeprefix(f"{model.base_model_prefix}.")
        first = next(iter(find(model).layers[0].state_dict()))
        for prefix in (f"{path}.", f"{short}."):
            if f"{prefix}0.{first}" in self.files:
                return prefix
        raise ValueError(
            f"{self.folder}: no tensor {path}.0.{first}, so its layers cannot be read one at a time; load and save the "
            "model with this transformers once"
        )


def _places(model: nn.Module, path: str) -> dict[str, str]:
    """Say for every module where its weights are: those of the layers on disk, all others in memory."""
    places: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = name.startswith(f"{path}.")
        if inside and name.removeprefix(f"{path}.").isdecimal():
            places[name] = "disk"
        elif not inside and not any(True for _ in module.children()):
            places[name] = "cpu"
    return places
