"""LoRA (Hu et al., arXiv 2106.09685): W + scale * B A with A (r, d_in) random and B (d_out, r) zero at the start.

The one file that opens peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from offsite.emulator.anatomy import find, is_transposed, linears, shape
from offsite.emulator.methods.base import Adapter, Factors, Place, factors
from offsite.emulator.seeds import generator

_ADAPTER = "default"  # peft's own name for the only adapter


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linear maps of the layers that train."""

    rank: int = 8
    alpha: float = 16.0
    ranks: dict[str, int] = field(default_factory=dict)  # site name -> smaller rank
    modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # or the endings of the maps' paths

    name: ClassVar[str] = "lora"
    kind: ClassVar[str] = "low-rank"

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

    def rank_at(self, site: str) -> int:
        """The rank a site trains at: the common one unless `ranks` names the site."""
        return self.ranks.get(site, self.rank)

    def start(self, model: nn.Module, layers: Mapping[int, int], *, seed: int, rank: int | None = None) -> Adapter:
        """Return the adapter that changes nothing; a lower rank gets the first rows of the same A. Raises ValueError.

        A is uniform in +-1/sqrt(d_in), as in peft, from a CPU generator of its own for each map.
        """
        stack = find(model).layers
        adapter: Adapter = {}
        for position, layer in layers.items():
            for path in self._targets(stack[position]):
                place = Place(layer, path)
                d_out, d_in = shape(stack[position].get_submodule(path))
                A = torch.empty(rank or self.rank, d_in)
                A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator(seed, place.key("A")))
                adapter |= {place.key("A"): A, place.key("B"): torch.zeros(d_out, rank or self.rank)}
        return adapter

    def _targets(self, layer: nn.Module) -> list[str]:
        paths = linears(layer)
        if self.modules == "all-linear":
            return paths
        for ending in self.modules:
            if not any(f".{path}".endswith(f".{ending}") for path in paths):
                raise ValueError(f"no linear map of a layer ends in {ending!r}; there are {', '.join(paths)}")
        return [path for path in paths if any(f".{path}".endswith(f".{ending}") for ending in self.modules)]

    def attach(self, model: nn.Module, layers: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Wrap the adapter's maps with peft, in place, at the ranks it has; raises ValueError if it does not fit."""
        pairs = factors(adapter)
        if {place.layer for place in pairs} != set(layers.values()):
            ids = sorted({place.layer for place in pairs})
            raise ValueError(f"the adapter is for layers {ids}, but those that train are {sorted(layers.values())}")
        position = {layer: at for at, layer in layers.items()}
        config = peft_config(model, {Place(position[p.layer], p.path): pair for p, pair in pairs.items()}, self.scale)
        attached: nn.Module = get_peft_model(model, config)
        live = self.named_parameters(attached, layers)
        if live.keys() != adapter.keys():
            raise ValueError(f"the model does not take the adapter's keys {sorted(live.keys() ^ adapter.keys())[:3]}")
        with torch.no_grad():
            for key, parameter in live.items():
                parameter.copy_(adapter[key])
        return attached

    def state(self, model: nn.Module, layers: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        live = self.named_parameters(model, layers)
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in live.items()}

    def named_parameters(self, model: nn.Module, layers: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        stack = find(model).layers
        live: dict[str, nn.Parameter] = {}
        for position, layer in layers.items():
            for path, module in stack[position].named_modules():
                if isinstance(module, LoraLayer):
                    wrapped: Any = module
                    live[Place(layer, path).key("A")] = wrapped.lora_A[_ADAPTER].weight
                    live[Place(layer, path).key("B")] = wrapped.lora_B[_ADAPTER].weight
        return live


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
