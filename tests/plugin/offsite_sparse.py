"""A method of a package of its own: some entries of each map train, and an index says which.

The index is drawn from the seed, the same at every site; it travels with the values and is never averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from offsite.emulator.anatomy.structure import adaptable, find
from offsite.emulator.methods.base import Disclosure, Formula, Kind
from offsite.emulator.outline import NARROWED, PACKED
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema, Tensors, Tier

Places = Mapping[int, int]


class Added(nn.Module):
    """W with values added at an index of its entries."""

    def __init__(self, index: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.values = nn.Parameter(values)

    def forward(self, weight: Tensor) -> Tensor:
        index: Tensor = self.get_buffer("index").long()
        return weight.flatten().index_add(0, index, self.values.to(weight.dtype)).view_as(weight)


@dataclass(frozen=True)
class Sparse:
    """Train `entries` entries of each map: "5.self_attn.q_proj.index" (entries) and ".values" (entries)."""

    entries: int = 16

    name: ClassVar[str] = "sparse"
    needs: ClassVar[frozenset[str]] = frozenset()
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED, PACKED})
    rate: ClassVar[float] = 1e-2
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    attaches: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    withheld: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = "arXiv 2401.16405"
    kind: ClassVar[Kind] = Kind.SELECTIVE
    formula: ClassVar[Formula] = Formula("map", "entries")
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    disclosure: ClassVar[Disclosure] = Disclosure.NOTHING

    def tier_at(self, site: str) -> Tier:
        return ""

    def tiers(self) -> frozenset[Tier]:
        return frozenset({""})

    def fits(self, model: nn.Module, places: Places) -> None:
        pass

    def schema(self, start: Tensors) -> Schema:
        fields: Schema = {}
        for key in (key for key in start if key.endswith(".index")):
            group, below = key.removesuffix(".index"), int(start[key].max()) + 1
            fields[key] = Field("I32", tuple(start[key].shape), Rule.FIXED, group, below=below)
            fields[f"{group}.values"] = Field("F32", tuple(start[key].shape), Rule.MEAN, group)
        return fields

    def start(self, model: nn.Module, places: Places, *, seed: int, tier: Tier = "") -> Tensors:
        adapter: Tensors = {}
        for position, layer in places.items():
            block = find(model).layers[position]
            for path in adaptable(block):
                size = block.get_submodule(path).get_parameter("weight").numel()
                index = torch.randperm(size, generator=generator(seed, f"{layer}.{path}"))[: self.entries]
                adapter |= {f"{layer}.{path}.index": index.int(), f"{layer}.{path}.values": torch.zeros(len(index))}
        return adapter

    def attach(self, model: nn.Module, places: Places, adapter: Tensors) -> nn.Module:
        own = self.start(model, places, seed=0)
        if own.keys() != adapter.keys():
            raise ValueError(f"the model does not take the adapter's keys {sorted(own.keys() ^ adapter.keys())[:3]}")
        model.requires_grad_(False)
        for position, layer in places.items():
            block = find(model).layers[position]
            for path in adaptable(block):
                key = f"{layer}.{path}"
                added = Added(adapter[f"{key}.index"].clone(), adapter[f"{key}.values"].clone())
                parametrize.register_parametrization(block.get_submodule(path), "weight", added)
        return model

    def _added(self, model: nn.Module, places: Places) -> dict[str, Added]:
        return {
            f"{layer}.{path.removesuffix('.parametrizations.weight.0')}": module
            for position, layer in places.items()
            for path, module in find(model).layers[position].named_modules()
            if isinstance(module, Added)
        }

    def state(self, model: nn.Module, places: Places) -> Tensors:
        state: Tensors = {}
        for key, added in self._added(model, places).items():
            state[f"{key}.index"] = added.get_buffer("index").to("cpu", copy=True)
            state[f"{key}.values"] = added.values.detach().to("cpu", copy=True)
        return state

    def named_parameters(self, model: nn.Module, places: Places) -> dict[str, nn.Parameter]:
        return {f"{key}.values": added.values for key, added in self._added(model, places).items()}

    def recover(self, adapter: Tensors, recovery: Mapping[str, Tensor]) -> Tensors:
        if recovery:
            raise ValueError("sparse: an emulator of narrowed maps has other entries than the base")
        return adapter

    def merge(self, base: nn.Module, adapter: Tensors) -> None:
        for key in (key.removesuffix(".index") for key in adapter if key.endswith(".index")):
            layer, _, path = key.partition(".")
            weight = find(base).layers[int(layer)].get_submodule(path).get_parameter("weight")
            with torch.no_grad():
                weight.view(-1).index_add_(0, adapter[f"{key}.index"].long(), adapter[f"{key}.values"].to(weight.dtype))

    def export(self, directory: Path, adapter: Tensors, *, base: nn.Module, base_name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(adapter, directory / "sparse.safetensors", metadata={"format": "pt"})
