"""A model folder read layer by layer, for models that do not fit into memory."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from offsite.emulator.anatomy.stack import follow
from offsite.emulator.anatomy.structure import find
from offsite.emulator.quiet import quiet
from offsite.emulator.zoo.weights import configurations, load, pretrained, tensor_files, untie, unwrapped


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
        return cls(folder, tensor_files(folder))

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by name; files are opened anew each time, so that what was read before can be let go."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            with safe_open(self.files[name], framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        return tensors

    def layer(self, model: nn.Module, number: int) -> dict[str, Tensor]:
        """Read one layer's tensors by their names inside it; raises ValueError if there is one missing."""
        prefix = f"{find(model).path}.{number}."
        names = list(find(model).layers[number].state_dict())
        stored = self._stored(model, (f"{prefix}{name}" for name in names))
        return dict(zip(names, self.read(stored.values()).values(), strict=True))

    def stream(self) -> tuple[Any, torch.dtype]:
        """Return the model with its layers left on disk, and the dtype they have there.

        Each is read when the forward pass comes to it, and computes in fp32. Raises ValueError if the folder does not
        hold the whole model, or its layers' tensors otherwise than the model does.
        """
        config = load(self.folder, "auto", hollow=True).config
        hollow = copy.deepcopy(config)
        follow(hollow.get_text_config(decoder=True), [], hollow.get_text_config(decoder=True).num_hidden_layers)
        # Without layers, for transformers knows under which names old files have the other tensors.
        rest, _ = pretrained(self.folder, hollow, "auto")
        untie(rest)
        for whole, part in zip(configurations(config), configurations(rest.config), strict=True):
            whole.tie_word_embeddings = part.tie_word_embeddings
        model = skeleton(config, dtype=rest.dtype)
        stored = rest.dtype
        rest.float()
        model.float()  # with its buffers, which came to be in what is stored
        anatomy = find(model)
        model.load_state_dict(rest.state_dict(), strict=False, assign=True)
        model.tie_weights()
        inside = (name for name in model.state_dict() if name.startswith(f"{anatomy.path}."))
        index = {
            name: {"safetensors_file": str(self.files[at]), "weight_name": at}
            for name, at in self._stored(model, inside).items()
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

    def _stored(self, model: Any, names: Iterable[str]) -> dict[str, str]:
        """Return under which names the files have a model's tensors.

        They may lack the model's own first name, or have it twice, and have the marks of wrappers. Raises ValueError.
        """
        first = f"{model.base_model_prefix}."
        places: dict[str, str] = {}
        for name in names:
            spellings = (name, name.removeprefix(first), first + name)
            at = next((self._plain[spelling] for spelling in spellings if spelling in self._plain), None)
            if at is None:
                raise ValueError(
                    f"{self.folder}: no tensor {name} as the model has it (transformers may make it of several, as of "
                    "the experts of a mixture), so its layers cannot be read one at a time; build it in memory, with "
                    "--no-stream"
                )
            places[name] = at
        return places

    @cached_property
    def _plain(self) -> dict[str, str]:
        """The files' tensors by their names without what wrappers put into them."""
        return {unwrapped(name): name for name in self.files}


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
