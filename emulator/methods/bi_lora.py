"""Bi-LoRA, LoRA of one or two bits a value (Jie et al., arXiv 2307.16867).

    y = W x + b + scale * B A x          A, B = mean + deviation * level of the nearest code

Latent values train in fp32, and every pass takes them to their codes; the gradient goes straight through the rounding,
and through the mean and the deviation. Codes and these two numbers leave a site: an update is a thirtieth of LoRA's.

The paper takes the mean and the deviation of the latent values. A round's latent values are those that its codes stand
for, whose deviation is another one; so that a round begins with what was sent, bit for bit, both are counted from
there: the mean by how far it has moved, the deviation by how much it has grown. The paper starts B from small values.
Here their deviation is so small, 1e-12, that a start changes nothing, and one step of training makes it the rate's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Factors, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.maps import wrapped
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import Modules
from offsite.emulator.outline import NARROWED
from offsite.emulator.seeds import generator
from offsite.kernels.bits import pack, unpack
from offsite.kernels.coded import EPSILON, LEVELS, Coded, decode, encode, nearest
from offsite.kernels.schema import Field, Rule, Schema

SMALL = 1e-12  # the deviation of B at a start


class Anchor(NamedTuple):
    """What takes the mean and the deviation of latent values to those of their codes."""

    offset: float
    factor: float
    floor: float  # of the deviation, where the values it is counted from have none

    @classmethod
    def of(cls, coded: Coded, values: Tensor) -> "Anchor":
        """Return that with which values that codes stand for have the line of the codes."""
        values = values.double()
        own = float(values.std(correction=0))
        offset = coded.mean - float(values.mean())
        return cls(offset, coded.deviation / own, 0.0) if own else cls(offset, 1.0, coded.deviation)

    def line(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the deviation."""
        return values.mean() + self.offset, self.factor * values.std(correction=0) + self.floor


class Binary(Beside):
    """A linear map with two factors beside it that are taken to their codes in every pass."""

    def __init__(self, linear: nn.Module, coded: Mapping[str, Coded], *, rank: int, bits: int, scale: float) -> None:
        """Take the map, the codes of both factors, and what multiplies the product."""
        device = next(iter(coded.values())).codes.device
        d_out, d_in = shape(linear)
        sizes = {"A": (rank, d_in), "B": (d_out, rank)}
        latent = {name: decode(coded[name], bits).float().view(size).to(device) for name, size in sizes.items()}
        super().__init__(linear, latent)
        self.bits, self.scale = bits, scale
        self.anchors = {name: Anchor.of(coded[name], latent[name]) for name in sizes}

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        A, B = self._rounded("A"), self._rounded("B")
        return y + self.scale * functional.linear(functional.linear(x.to(A.dtype), A), B).to(y.dtype)

    def _rounded(self, name: str) -> Tensor:
        """Return what a factor's codes stand for, with the latent values' gradient."""
        latent = self.get_parameter(name)
        mean, deviation = self.anchors[name].line(latent)
        z = (latent - mean) / (deviation + EPSILON)
        codes = nearest(latent.detach(), mean.detach(), deviation.detach(), self.bits)
        levels = torch.tensor(LEVELS[self.bits], dtype=z.dtype, device=z.device)[codes.long()]
        return mean + deviation * (z + (levels - z).detach())

    def coded(self, name: str) -> Coded:
        """Return the codes (n,) of a factor on the CPU."""
        values = self.get_parameter(name).detach().to("cpu", torch.float64).flatten()
        mean, deviation = (float(one.float()) for one in self.anchors[name].line(values))
        return Coded(nearest(values, mean, deviation, self.bits), mean, deviation)


@dataclass(frozen=True)
class BiLora(BesideMaps):
    """Train LoRA's factors of some maps in `bits` a value.

    An adapter has "28.self_attn.q_proj.A_codes" (ceil(rank * d_in * bits / 8),) uint8, ".A_line" (2,), the mean and the
    deviation, the same of B (d_out, rank), and ".size" (2,) int32, the map's (d_out, d_in).
    """

    rank: int = 32
    alpha: float = 64.0
    bits: Literal[1, 2] = 1
    modules: Modules = "all-linear"

    name: ClassVar[str] = "bi-lora"
    rate: ClassVar[float] = 3e-3
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.REQUANTISE, Rule.FIXED})
    paper: ClassVar[str] = "arXiv 2307.16867"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "rank * (d_in + d_out)")
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")

    @property
    def axes(self) -> Axes:
        """Bytes of two factors, and pairs of numbers."""
        pairs = dict.fromkeys(("A_line", "B_line", "size"), ("pair",))
        return {"A_codes": ("bytes of A",), "B_codes": ("bytes of B",), **pairs}

    @property
    def scale(self) -> float:
        """What multiplies the product."""
        return self.alpha / self.rank

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return LoRA's maps, those that peft can tell from experts; raises ValueError as `BesideMaps.maps` does."""
        return peft_format.maps(model, places, self.modules, method="Bi-LoRA")

    def schema(self, start: Adapter) -> Schema:
        """Return codes that are averaged as what they stand for, and sizes that all sites have in common."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            size = parts["size"].tolist()
            for name, count in self._counts(size).items():
                group, bits = place.key(name), count * self.bits
                fields[place.key(f"{name}_codes")] = Field(
                    "U8", tuple(parts[f"{name}_codes"].shape), Rule.REQUANTISE, group, bits=bits, width=self.bits
                )
                fields[place.key(f"{name}_line")] = Field("F32", (2,), Rule.REQUANTISE, group)
            fields[place.key("size")] = Field("I32", (2,), Rule.FIXED, below=max(size) + 1)
        return fields

    def initial(self, place: Place, linear: nn.Module, seed: int) -> Parts:
        """Return the codes of a uniform A, and codes of B that are drawn, with next to no deviation."""
        d_out, d_in = shape(linear)
        random = {name: generator(seed, place.key(name)) for name in "AB"}
        A = torch.empty(self.rank * d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=random["A"])
        codes = torch.randint(2**self.bits, (d_out * self.rank,), generator=random["B"], dtype=torch.uint8)
        return self._parts({"A": encode(A, self.bits), "B": Coded(codes, 0.0, SMALL)}, (d_out, d_in))

    def beside(self, linear: nn.Module, parts: Parts) -> Binary:
        """Return a map with latent factors."""
        return Binary(linear, self._coded(parts), rank=self.rank, bits=self.bits, scale=self.scale)

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live latent values of an attached model by the keys of their codes."""
        modules = wrapped(model, places, Binary)
        return {place.key(f"{name}_codes"): one.get_parameter(name) for place, one in modules.items() for name in "AB"}

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the codes off an attached model."""
        adapter: Adapter = {}
        for place, one in wrapped(model, places, Binary).items():
            parts = self._parts({name: one.coded(name) for name in "AB"}, shape(one.linear))
            adapter |= {place.key(name): part for name, part in parts.items()}
        return adapter

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map of a model with its codes; raises ValueError if they are of a map of another size."""
        for place, linear, parts in super().fitting(model, maps):
            if (size := tuple(parts["size"].tolist())) != shape(linear):
                raise ValueError(
                    f"{place.key('size')!r}: {size} is not that of the map, (d_out, d_in) = {shape(linear)}"
                )
            yield place, linear, parts

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "and no code is the zero of what it lacks")
        return adapter

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and the bias as it is."""
        A, B = self._factors(parts)
        return W + self.scale * (B @ A).to(W.device), b

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write what the codes stand for as LoRA, for `PeftModel.from_pretrained` on the base."""
        fitting = self.fitting(base, grouped(adapter, self.axes))
        pairs = {place: self._factors(parts) for place, _, parts in fitting}
        scales = dict.fromkeys(pairs, self.scale)
        peft_format.write(directory, pairs, scales, base=base, base_name=base_name)

    def _counts(self, size: Any) -> dict[str, int]:
        """Return how many values each factor of a map has."""
        return {"A": self.rank * size[1], "B": size[0] * self.rank}

    def _parts(self, coded: Mapping[str, Coded], size: tuple[int, int]) -> Parts:
        parts = {"size": torch.tensor(size, dtype=torch.int32)}
        for name, (codes, *line) in coded.items():
            parts |= {f"{name}_codes": pack(codes, self.bits), f"{name}_line": torch.tensor(line)}
        return parts

    def _coded(self, parts: Parts) -> dict[str, Coded]:
        counts = self._counts(parts["size"].tolist())
        codes = {name: unpack(parts[f"{name}_codes"], count, self.bits) for name, count in counts.items()}
        device = parts["size"].device
        return {name: Coded(codes[name].to(device), *parts[f"{name}_line"].tolist()) for name in counts}

    def _factors(self, parts: Parts) -> Factors:
        A, B = (decode(coded, self.bits).float() for coded in self._coded(parts).values())
        return Factors(A.view(self.rank, -1), B.view(-1, self.rank))
