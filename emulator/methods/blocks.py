"""Whole layers, every parameter of them, as in Offsite-Tuning (Xiao et al., arXiv 2302.04870)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.methods.base import Adapter, Averaged, Formula, Kind
from offsite.emulator.outline import NARROWED, PACKED
from offsite.kernels.schema import Tier


@dataclass(frozen=True)
class Blocks(Averaged):
    """The parameters of the layers that train; an adapter holds their values: "28.self_attn.q_proj.weight"."""

    name: ClassVar[str] = "blocks"
    needs: ClassVar[frozenset[str]] = frozenset()
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED, PACKED})
    rate: ClassVar[float] = 2e-4
    paper: ClassVar[str] = "arXiv 2302.04870"
    kind: ClassVar[Kind] = Kind.SELECTIVE
    formula: ClassVar[Formula] = Formula("layer", "parameters")
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = False

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Any layer can train whole."""

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return the layers as they are; raises ValueError if their maps are stored in a format of few bits."""
        for place, layer in places.items():
            if any(isinstance(module, PackedLinear) for module in find(model).layers[place].modules()):
                raise ValueError(
                    f"layer {layer} is stored in few bits and cannot train as a whole; choose another method"
                )
        return self.state(model, places)

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Give the layers fp32 parameters of their own; raises ValueError if the adapter does not fit them."""
        frozen = next(model.parameters()).dtype
        model.requires_grad_(False)
        stack = find(model).layers
        expected = {f"{layer}.{name}": p for at, layer in places.items() for name, p in stack[at].named_parameters()}
        _check(adapter, expected)
        for place, layer in places.items():
            for name, _ in list(stack[place].named_parameters()):
                path, _, leaf = name.rpartition(".")
                value = adapter[f"{layer}.{name}"].detach().clone().to(expected[f"{layer}.{name}"].device)
                setattr(stack[place].get_submodule(path), leaf, nn.Parameter(value))
            if frozen != torch.float32:
                _compute_in(stack[place], frozen)
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the layers off a model as CPU fp32 copies."""
        live = self.named_parameters(model, places)
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in live.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the layers' live parameters by adapter key."""
        stack = find(model).layers
        return {f"{layer}.{name}": p for at, layer in places.items() for name, p in stack[at].named_parameters()}

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter: a whole layer is the base's own. Raises ValueError if it was narrowed or packed."""
        changed = {key.rpartition(".")[0] for key in recovery}
        if clash := next((key for key in adapter if key.rpartition(".")[0] in changed), None):
            raise ValueError(
                f"{clash}: the emulator's layer is not the base's, so it cannot take its place; choose another method"
            )
        return adapter

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Put the layers in the place of the base's; raises ValueError if they do not fit."""
        stack = find(base).layers
        _check(adapter, {f"{at}.{name}": p for at, layer in enumerate(stack) for name, p in layer.named_parameters()})
        with torch.no_grad():
            for key, value in adapter.items():
                layer, _, name = key.partition(".")
                stack[int(layer)].get_parameter(name).copy_(value)

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `layers.safetensors` with the layers' tensors under their names in the base."""
        path = find(base).path
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"{path}.{key}": value.contiguous() for key, value in sorted(adapter.items())}
        save_file(tensors, directory / "layers.safetensors", metadata={"format": "pt"})


def _check(adapter: Adapter, expected: Mapping[str, Tensor]) -> None:
    for key, value in adapter.items():
        if key not in expected or expected[key].shape != value.shape:
            actual = f"has it as {tuple(expected[key].shape)}" if key in expected else "has no such tensor"
            raise ValueError(f"{key!r} {tuple(value.shape)} does not fit the model, which {actual}")


def _compute_in(layer: nn.Module, dtype: torch.dtype) -> None:
    """Have a layer with fp32 parameters compute in the dtype of the rest of the model."""
    forward = layer.forward

    def cast(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(hidden.device.type, dtype=dtype):
            return forward(hidden, *arguments, **named)

    layer.forward = cast
