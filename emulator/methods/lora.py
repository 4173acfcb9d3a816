"""LoRA (Hu et al., arXiv 2106.09685): W + scale * B A with A (r, d_in) random and B (d_out, r) zero at the start.

The one file that opens peft.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import adaptable, find, is_transposed, linears, shape
from offsite.emulator.methods.base import Adapter, Factors, Place, factors
from offsite.emulator.methods.recovery import widen
from offsite.emulator.quiet import quiet
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema, Tier

_ADAPTER = "default"  # peft's own name for the only adapter


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linear maps of the layers that train.

    All of them are those that `structure.adaptable` names and peft can tell from experts; these stay as they are.
    """

    rank: int = 8
    alpha: float = 16.0
    ranks: dict[str, int] = field(default_factory=dict)  # site name -> smaller rank
    modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # or the endings of the maps' paths

    name: ClassVar[str] = "lora"
    needs: ClassVar[frozenset[str]] = frozenset()
    rate: ClassVar[float] = 3e-3  # where alpha is twice the rank
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT})
    attaches: ClassVar[bool] = True
    withheld: ClassVar[frozenset[str]] = frozenset({"ranks"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")
        for site, rank in self.ranks.items():
            if not 1 <= rank <= self.rank:
                raise ValueError(f"ranks: site {site!r} must have a rank in 1..{self.rank}, got {rank}")

    @property
    def scale(self) -> float:
        """alpha / rank, the same at every site whatever its rank."""
        return self.alpha / self.rank

    def tier_at(self, site: str) -> Tier:
        """Return "r8" for a site that trains at rank 8: the common one unless `ranks` names the site."""
        return f"r{self.ranks.get(site, self.rank)}"

    def tiers(self) -> frozenset[Tier]:
        """Return those of the common rank and of each that `ranks` names."""
        return frozenset(f"r{rank}" for rank in (self.rank, *self.ranks.values()))

    def _rank(self, tier: Tier) -> int:
        ranks = {"": self.rank} | {f"r{rank}": rank for rank in range(1, self.rank + 1)}
        if tier not in ranks:
            raise ValueError(f"there is no tier {tier!r}, only r1 to r{self.rank}: no rank is above the method's")
        return ranks[tier]

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has no map to adapt, or an ending names none."""
        self.maps(model, places)

    def schema(self, start: Adapter) -> Schema:
        """Return products of two factors, whose rank is a site's own."""
        fields: Schema = {}
        for place, (A, B) in factors(start).items():
            group = f"{place.layer}.{place.path}"
            fields[place.key("A")] = Field("F32", (None, A.shape[1]), Rule.PRODUCT, group)
            fields[place.key("B")] = Field("F32", (B.shape[0], None), Rule.PRODUCT, group)
        return fields

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return the adapter that changes nothing; a lower rank gets the first rows of the same A. Raises ValueError.

        A is uniform in +-1/sqrt(d_in), as in peft, from a CPU generator of its own for each map.
        """
        stack, rank = find(model).layers, self._rank(tier)
        adapter: Adapter = {}
        for position, paths in self.maps(model, places).items():
            for path in paths:
                place = Place(places[position], path)
                d_out, d_in = shape(stack[position].get_submodule(path))
                A = torch.empty(rank, d_in)
                A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator(seed, place.key("A")))
                adapter |= {place.key("A"): A, place.key("B"): torch.zeros(d_out, rank)}
        return adapter

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps to adapt at each place; raises ValueError if a layer, or an ending, has none."""
        stack = find(model).layers
        every = {at: linears(stack[at]) for at in places}
        taken = _taken(model, every)
        if self.modules == "all-linear":
            maps = {at: [path for path in adaptable(stack[at]) if path not in taken] for at in places}
        else:
            known = dict.fromkeys(path for paths in every.values() for path in paths)
            for ending in self.modules:
                if not any(_ends(path, ending) for path in known):
                    raise ValueError(f"no linear map of a layer ends in {ending!r}; there are {', '.join(known)}")
            maps = {at: [p for p in every[at] if any(_ends(p, e) for e in self.modules)] for at in places}
            if lost := sorted(taken & {p for paths in maps.values() for p in paths}):
                raise ValueError(
                    f"peft takes {lost[0]} of this family for a part of its experts; leave it out of modules"
                )
        for at, paths in maps.items():
            if not paths:
                raise ValueError(
                    f"layer {places[at]} has no linear map for LoRA; name some as modules (it has "
                    f"{', '.join(every[at]) or 'none'}), or train it whole, with the method blocks"
                )
        return maps

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Wrap the adapter's maps with peft, in place, at the ranks it has; raises ValueError if it does not fit."""
        pairs = factors(adapter)
        if {place.layer for place in pairs} != set(places.values()):
            ids = sorted({place.layer for place in pairs})
            raise ValueError(f"the adapter is for layers {ids}, but those that train are {sorted(places.values())}")
        position = {layer: at for at, layer in places.items()}
        config = peft_config(model, {Place(position[p.layer], p.path): pair for p, pair in pairs.items()}, self.scale)
        with quiet():
            attached: nn.Module = get_peft_model(model, config)
        live = self.named_parameters(attached, places)
        if live.keys() != adapter.keys():
            raise ValueError(f"the model does not take the adapter's keys {sorted(live.keys() ^ adapter.keys())[:3]}")
        with torch.no_grad():
            for key, parameter in live.items():
                parameter.copy_(adapter[key])
        return attached

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        live = self.named_parameters(model, places)
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in live.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        stack = find(model).layers
        live: dict[str, nn.Parameter] = {}
        for position, layer in places.items():
            for path, module in stack[position].named_modules():
                if isinstance(module, LoraLayer):
                    wrapped: Any = module
                    live[Place(layer, path).key("A")] = wrapped.lora_A[_ADAPTER].weight
                    live[Place(layer, path).key("B")] = wrapped.lora_B[_ADAPTER].weight
        return live

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Put rows and columns of zeros where the emulator's maps were narrowed (LoRAM, arXiv 2502.13533)."""
        return widen(adapter, recovery)

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add scale * B @ A to the weights, in place and in fp32; raises ValueError if it does not fit."""
        pairs = factors(adapter)
        peft_config(base, pairs, self.scale)  # refuses what does not fit before anything is changed
        stack = find(base).layers
        with torch.no_grad():
            for place, (A, B) in pairs.items():
                module = stack[place.layer].get_submodule(place.path)
                weight = module.get_parameter("weight")
                change = self.scale * (B.to(weight.device, torch.float32) @ A.to(weight.device, torch.float32))
                weight.copy_(weight.float() + (change.T if is_transposed(module) else change))

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base."""
        pairs = factors(adapter)
        config = peft_config(base, pairs, self.scale)
        config.base_model_name_or_path = base_name
        config.inference_mode = True
        config.save_pretrained(directory)
        # peft keeps names in a set, whose order differs from process to process; equal adapters get equal files.
        file = directory / "adapter_config.json"
        document = json.loads(file.read_text())
        document["target_modules"] = sorted(document["target_modules"])
        file.write_text(json.dumps(document, indent=2, sort_keys=True))
        path = find(base).path
        tensors: Adapter = {}
        for place, (A, B) in pairs.items():
            name = f"base_model.model.{path}.{place.layer}.{place.path}"
            tensors |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def read(directory: Path) -> Adapter:
    """Read an adapter back that `export` wrote."""
    adapter: Adapter = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        layer, path, part = re.fullmatch(r".*?\.(\d+)\.(.+)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        adapter[Place(int(layer), path).key(part)] = tensor
    return adapter


def _taken(model: Any, maps: Mapping[int, list[str]]) -> set[str]:
    """Return the paths that peft would take for those of experts, by names that a mixture's old checkpoints had."""
    paths = {path for listed in maps.values() for path in listed}
    config = LoraConfig(target_modules=paths)
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    return paths - set(config.target_modules or ())


def _ends(path: str, ending: str) -> bool:
    return f".{path}".endswith(f".{ending}")


def peft_config(model: nn.Module, pairs: Mapping[Place, Factors], scale: float) -> Any:
    """Return peft's configuration of adapters at a model's own layer numbers; raises ValueError if they do not fit."""
    anatomy = find(model)
    transposed = False
    ranks: dict[str, int] = {}
    for place, pair in pairs.items():
        if not 0 <= place.layer < len(anatomy.layers):
            raise ValueError(f"the adapter is for layer {place.layer}, the model has {len(anatomy.layers)} layers")
        layer = anatomy.layers[place.layer]
        if place.path not in linears(layer):
            raise ValueError(f"the layers have no linear map {place.path!r}; there are {', '.join(linears(layer))}")
        module = layer.get_submodule(place.path)
        if shape(module) != (pair.B.shape[0], pair.A.shape[1]):
            raise ValueError(
                f"{place.key('A')!r}: A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)} do not fit a linear map "
                f"of (d_out, d_in) = {shape(module)}"
            )
        transposed = transposed or is_transposed(module)
        ranks[f"{anatomy.path}.{place.layer}.{place.path}"] = pair.rank
    usual = max(ranks.values())
    unusual = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=scale * usual,
        target_modules=sorted(ranks),
        rank_pattern=unusual,
        alpha_pattern={name: scale * rank for name, rank in unusual.items()},  # keeps the scale whatever the rank
        fan_in_fan_out=transposed,
    )
