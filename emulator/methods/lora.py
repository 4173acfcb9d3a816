"""LoRA (Hu et al., arXiv 2106.09685): W + scale * B A with A (r, d_in) random and B (d_out, r) zero at the start.

The scale is alpha / r, or alpha / sqrt(r) as in rsLoRA (Kalajdzievski, arXiv 2312.03732), with which a step moves W by
as much at a high rank as at a low one.
With `init` it is W + scale * (B A - B0 A0) instead, where A0 and B0 are made of W, or of what sites have measured, and
A and B start as these. W stays what it is, and the change is still linear in the product, so that its mean over sites
is exact. Of EVA's start nothing has to be taken off: its B is zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find, is_transposed, shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Disclosure, Factors, Formula, Kind, Place, factors
from offsite.emulator.methods.initial import INITS, Init
from offsite.emulator.methods.measured import STARTS, Measured
from offsite.emulator.methods.recovery import widen
from offsite.emulator.methods.sums import Statistics
from offsite.emulator.methods.targets import Modules, ends_in
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema, Tier

N = TypeVar("N", int, float)
FIRST = {"A0": "A", "B0": "B"}  # the part of a key of what is taken off again -> that of what trains


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
    init: Init | Measured = "random"  # what A and B start from; taken off again, it is one start for all sites

    name: ClassVar[str] = "lora"
    needs: ClassVar[frozenset[str]] = frozenset()
    spares: ClassVar[frozenset[str]] = frozenset()
    rate: ClassVar[float] = 3e-3  # where alpha is twice the rank
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT})  # and fixed ones with an init that is taken off
    attaches: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    withheld: ClassVar[frozenset[str]] = frozenset({"ranks"})
    paper: ClassVar[str] = "arXiv 2106.09685"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "rank * (d_in + d_out)")
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = True  # but not with an init of W
    disclosure: ClassVar[Disclosure] = Disclosure.NOTHING  # but parts of W with an init that has them

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")
        for site, rank in self.ranks.items():
            if not 1 <= rank <= self.rank:
                raise ValueError(f"ranks: site {site!r} must have a rank in 1..{self.rank}, got {rank}")
        for setting, pattern in self._patterns.items():
            if odd := [ending for ending, value in pattern.items() if value <= 0]:
                raise ValueError(f"{setting}: maps {odd[0]!r} must have more than 0, got {pattern[odd[0]]}")
        if self.offset:
            if self.ranks:
                raise ValueError(
                    f"init {self.init!r} has one start, of one rank, for all sites, so that none can have a smaller "
                    "one; leave out ranks, or take init 'random'"
                )
            object.__setattr__(self, "rules", self.rules | {Rule.FIXED})  # the dataclass is frozen
        if self._weighty:
            object.__setattr__(self, "seeded", False)
        if self._weighty or (self.init in STARTS and STARTS[self.init].weights):
            object.__setattr__(self, "disclosure", Disclosure.PARTS)

    @property
    def _patterns(self) -> dict[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    @property
    def _weighty(self) -> bool:
        """Whether a start is made of weights alone."""
        return self.init in INITS

    @property
    def offset(self) -> bool:
        """Whether a start changes W, and is taken off again."""
        return self.init not in ("random", "eva")

    @property
    def takes(self) -> str:
        """See `methods.base.Beginning`."""
        return STARTS[self.init].takes if self.init in STARTS else ""

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
        """Raise ValueError if a layer has no map to adapt, an ending names none, or a map has too low a rank."""
        for place, linear in self._linears(model, places):
            each = STARTS[self.init].directions if self.init in STARTS else 1
            rank, most = self._rank_of(place.path, ""), min(shape(linear)) // each
            if self.init != "random" and rank > most:
                raise ValueError(
                    f"rank {rank} is more than {place.layer}.{place.path} {shape(linear)} has, {most}, and init "
                    f"{self.init!r} makes no more factors of it; lower rank, or name the map in rank_pattern"
                )

    def schema(self, start: Adapter) -> Schema:
        """Return products of two factors, whose rank is a site's own, and the fixed ones that are taken off."""
        moving, first = self._apart(start)
        fields: Schema = {key: Field("F32", tuple(tensor.shape), Rule.FIXED) for key, tensor in _zeroth(first).items()}
        for place, (A, B) in factors(moving).items():
            group = f"{place.layer}.{place.path}"
            fields[place.key("A")] = Field("F32", (None, A.shape[1]), Rule.PRODUCT, group)
            fields[place.key("B")] = Field("F32", (B.shape[0], None), Rule.PRODUCT, group)
        return fields

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return the adapter that changes nothing; a lower rank has the first rows of the same A. Raises ValueError.

        A is uniform in +-1/sqrt(d_in), as in peft, from a CPU generator of its own for each map. With an init of
        weights both are made of those that the model has, which in few bits or narrowed are not quite the base's. An
        init of what sites have measured is for `begin`: here A is random with it, too.
        """
        self.fits(model, places)
        adapter: Adapter = {}
        for place, linear in self._linears(model, places):
            (d_out, d_in), rank = shape(linear), self._rank_of(place.path, tier)
            if self._weighty:
                pair = INITS[self.init](_weight(linear), rank, self.scale_of(place.path))
            else:
                A = torch.empty(rank, d_in)
                A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator(seed, place.key("A")))
                pair = Factors(A, torch.zeros(d_out, rank))
            adapter |= self._started(place, pair)
        return adapter

    def begin(
        self, model: nn.Module, places: Mapping[int, int], statistics: Adapter, *, seed: int, tier: Tier = ""
    ) -> Adapter:
        """See `methods.base.Beginning`: factors of `methods.measured`, of the weights that the model has."""
        self.fits(model, places)
        adapter: Adapter = {}
        measured, make = Statistics(statistics, model, places), STARTS[self.init].make
        for place, linear in self._linears(model, places):
            rank, scale = self._rank_of(place.path, tier), self.scale_of(place.path)
            adapter |= self._started(place, make(_weight(linear), measured, place, rank, scale))
        return adapter

    def _started(self, place: Place, pair: Factors) -> Adapter:
        """Return a map's factors, and what is taken off again."""
        first = {place.key("A"): pair.A, place.key("B"): pair.B}
        return {key: tensor.clone() for key, tensor in first.items()} | (_zeroth(first) if self.offset else {})

    def _linears(self, model: nn.Module, places: Mapping[int, int]) -> Iterator[tuple[Place, Any]]:
        """Yield the maps to adapt."""
        stack = find(model).layers
        for position, paths in self.maps(model, places).items():
            for path in paths:
                yield Place(places[position], path), stack[position].get_submodule(path)

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps to adapt at each place; raises ValueError if a layer, or an ending, has none."""
        maps = peft_format.maps(model, places, self.modules, method="LoRA")
        known = dict.fromkeys(path for paths in maps.values() for path in paths)
        for setting, pattern in self._patterns.items():
            if lost := [ending for ending in pattern if not any(ends_in(path, ending) for path in known)]:
                raise ValueError(f"{setting}: no map that trains ends in {lost[0]!r}; there are {', '.join(known)}")
        return maps

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Wrap the adapter's maps with peft, in place, at the ranks it has; raises ValueError if it does not fit."""
        moving, first = self._apart(adapter)
        return peft_format.attach(model, places, moving, self._scales(moving), first=first)

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        tensors = self.named_parameters(model, places) | _zeroth(peft_format.fixed(model, places))
        return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        return peft_format.live(model, places)

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Put rows and columns of zeros where the emulator's maps were narrowed (LoRAM, arXiv 2502.13533)."""
        moving, first = self._apart(adapter)
        return widen(moving, recovery) | (_zeroth(widen(first, recovery)) if first else {})

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add scale * B @ A to the weights, in place and in fp32; raises ValueError if it does not fit."""
        moving, first = self._apart(adapter)
        pairs, scales, starts = factors(moving), self._scales(moving), factors(first) if first else {}
        peft_format.config_of(base, pairs, scales)  # refuses what does not fit before anything is changed
        stack = find(base).layers
        with torch.no_grad():
            for place, (A, B) in pairs.items():
                module = stack[place.layer].get_submodule(place.path)
                weight = module.get_parameter("weight")
                change = _product(B, A, weight.device)
                if place in starts:  # nothing is left of a start, bit for bit, unlike in one product of all factors
                    change -= _product(starts[place].B, starts[place].A, weight.device)
                change *= scales[place]
                weight.copy_(weight.float() + (change.T if is_transposed(module) else change))

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base."""
        moving, first = self._apart(adapter)
        pairs = factors(moving)
        for place, (A, B) in (factors(first) if first else {}).items():
            A, B = torch.cat([pairs[place].A, A]), torch.cat([pairs[place].B, -B], dim=1)
            pairs[place] = Factors(A, B)  # twice the rank, and stock peft needs no other base
        peft_format.write(directory, pairs, self._scales(moving), base=base, base_name=base_name)

    def _apart(self, adapter: Adapter) -> tuple[Adapter, Adapter]:
        """Return what trains, and what is taken off by the same keys; raises ValueError if one lacks the other."""
        if not self.offset:
            return adapter, {}
        first = {key for key in adapter if key.rpartition(".")[2] in FIRST}
        moving = {key: tensor for key, tensor in adapter.items() if key not in first}
        taken = {_renamed(key, FIRST): adapter[key] for key in sorted(first)}
        if odd := sorted(moving.keys() ^ taken.keys()):
            raise ValueError(f"{odd[0]!r}: with init {self.init!r} an adapter has A and B of a map, and A0 and B0")
        return moving, taken


def _of(pattern: Mapping[str, N], path: str, usual: N) -> N:
    """Return what a pattern says of a map, by the longest ending that its path has."""
    fitting = [ending for ending in pattern if ends_in(path, ending)]
    return pattern[max(fitting, key=len)] if fitting else usual


def _zeroth(adapter: Adapter) -> Adapter:
    """Return factors by the keys of what is taken off."""
    return {_renamed(key, {part: zeroth for zeroth, part in FIRST.items()}): tensor for key, tensor in adapter.items()}


def _renamed(key: str, parts: Mapping[str, str]) -> str:
    name, _, part = key.rpartition(".")
    return f"{name}.{parts[part]}"


def _weight(linear: Any) -> Tensor:
    """Return W (d_out, d_in) of a map, unpacked where it is in few bits."""
    W: Tensor = linear.weight.T if is_transposed(linear) else linear.weight
    return W


def _product(B: Tensor, A: Tensor, device: torch.device) -> Tensor:
    return B.to(device, torch.float32) @ A.to(device, torch.float32)
