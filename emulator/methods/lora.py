"""LoRA (Hu et al., arXiv 2106.09685): W + scale * B A with A (r, d_in) random and B (d_out, r) zero at the start.

The scale is alpha / r, or alpha / sqrt(r) as in rsLoRA (Kalajdzievski, arXiv 2312.03732), with which a step moves W by
as much at a high rank as at a low one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find, is_transposed, shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Formula, Kind, Place, factors
from offsite.emulator.methods.recovery import widen
from offsite.emulator.methods.targets import Modules, ends_in
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema, Tier

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linear maps of the layers that train.

    All of them are those that `structure.adaptable` names and peft can tell from experts; these stay as they are. The
    patterns are by the ending of a map's path, such as "mlp.down_proj"; where several fit, the longest counts. The
    formula is of maps that have the common rank.
    """

    rank: int = 8
    alpha: float = 16.0
    ranks: dict[str, int] = field(default_factory=dict)  # site name -> smaller rank, the most that its maps have
    modules: Modules = "all-linear"
    scaling: Literal["alpha / rank", "alpha / sqrt(rank)"] = "alpha / rank"
    rank_pattern: dict[str, int] = field(default_factory=dict)  # ending -> these maps' rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # ending -> these maps' alpha

    name: ClassVar[str] = "lora"
    needs: ClassVar[frozenset[str]] = frozenset()
    spares: ClassVar[frozenset[str]] = frozenset()
    rate: ClassVar[float] = 3e-3  # where alpha is twice the rank
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT})
    attaches: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    withheld: ClassVar[frozenset[str]] = frozenset({"ranks"})
    paper: ClassVar[str] = "arXiv 2106.09685"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "rank * (d_in + d_out)")
    linear: ClassVar[bool] = False
    seeded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")
        for site, rank in self.ranks.items():
            if not 1 <= rank <= self.rank:
                raise ValueError(f"ranks: site {site!r} must have a rank in 1..{self.rank}, got {rank}")
        for ending, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank_pattern: maps {ending!r} must have a rank of at least 1, got {rank}")
        for ending, alpha in self.alpha_pattern.items():
            if alpha <= 0:
                raise ValueError(f"alpha_pattern: maps {ending!r} must have a positive alpha, got {alpha}")

    def scale_of(self, path: str) -> float:
        """Return what multiplies a map's product: the same at every site, whatever its rank, and in an average."""
        rank, alpha = _of(self.rank_pattern, path, self.rank), _of(self.alpha_pattern, path, self.alpha)
        return alpha / (rank if self.scaling == "alpha / rank" else rank**0.5)

    def _scales(self, adapter: Adapter) -> dict[Place, float]:
        return {place: self.scale_of(place.path) for place in factors(adapter)}

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

    def _rank_of(self, path: str, tier: Tier) -> int:
        own, most = _of(self.rank_pattern, path, self.rank), self._rank(tier)
        return own if most == self.rank else min(own, most)

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
        stack = find(model).layers
        adapter: Adapter = {}
        for position, paths in self.maps(model, places).items():
            for path in paths:
                place = Place(places[position], path)
                d_out, d_in = shape(stack[position].get_submodule(path))
                rank = self._rank_of(path, tier)
                A = torch.empty(rank, d_in)
                A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator(seed, place.key("A")))
                adapter |= {place.key("A"): A, place.key("B"): torch.zeros(d_out, rank)}
        return adapter

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps to adapt at each place; raises ValueError if a layer, or an ending, has none."""
        maps = peft_format.maps(model, places, self.modules, method="LoRA")
        known = dict.fromkeys(path for paths in maps.values() for path in paths)
        for setting, endings in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if lost := [ending for ending in endings if not any(ends_in(path, ending) for path in known)]:
                raise ValueError(f"{setting}: no map that trains ends in {lost[0]!r}; there are {', '.join(known)}")
        return maps

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Wrap the adapter's maps with peft, in place, at the ranks it has; raises ValueError if it does not fit."""
        return peft_format.attach(model, places, adapter, self._scales(adapter))

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        live = self.named_parameters(model, places)
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in live.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        return peft_format.live(model, places)

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Put rows and columns of zeros where the emulator's maps were narrowed (LoRAM, arXiv 2502.13533)."""
        return widen(adapter, recovery)

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add scale * B @ A to the weights, in place and in fp32; raises ValueError if it does not fit."""
        pairs, scales = factors(adapter), self._scales(adapter)
        peft_format.config_of(base, pairs, scales)  # refuses what does not fit before anything is changed
        stack = find(base).layers
        with torch.no_grad():
            for place, (A, B) in pairs.items():
                module = stack[place.layer].get_submodule(place.path)
                weight = module.get_parameter("weight")
                change = scales[place] * (B.to(weight.device, torch.float32) @ A.to(weight.device, torch.float32))
                weight.copy_(weight.float() + (change.T if is_transposed(module) else change))

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base."""
        peft_format.write(directory, factors(adapter), self._scales(adapter), base=base, base_name=base_name)


def _of(pattern: Mapping[str, N], path: str, usual: N) -> N:
    """Return what a pattern says of a map, by the longest ending that its path has."""
    fitting = [ending for ending in pattern if ends_in(path, ending)]
    return pattern[max(fitting, key=len)] if fitting else usual
