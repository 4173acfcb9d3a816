"""MoSA, mixture of sparse adapters (Zhang et al., arXiv 2312.02923): experts that have some of a bottleneck's entries.

    y + U f(D x)        U (d_out, width): each entry is one expert's, of as many as there are

The seed splits the entries of U among the `experts`, as evenly as can be. An expert's entries are one group, so that
with the part `by-expert` a site trains those of one expert in a round: the union of what sites with different experts
have learned is W_0 plus the sum of their changes, exactly. D is every expert's. Without that part all of them train,
and it is a bottleneck, as it is in what is exported: one dense adapter. The paper takes one expert a step at random.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import shape
from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.bottleneck import ACTIVATIONS, Bottleneck
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import MlpOutput, Modules, Outputs
from offsite.emulator.outline import NARROWED
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Field, Rule, Schema


class Mixed(Beside):
    """A linear map with a bottleneck behind it, or along it, of which the entries of U are experts'."""

    def __init__(self, linear: nn.Module, parts: Parts, *, series: bool, activation: str) -> None:
        """Take the map, "down", each expert's "index_0" and "up_0", and where the bottleneck is."""
        super().__init__(linear, parts, fixed={part for part in parts if part.startswith("index")})
        self.series, self.activation = series, ACTIVATIONS[activation]
        self.experts = sum(part.startswith("index") for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        down, buffers = self.get_parameter("down"), dict(self.named_buffers(recurse=False))
        up = assembled({**self.parts, **buffers}, self.experts)
        inward = (y if self.series else x).to(down.dtype)
        return y + functional.linear(self.activation(functional.linear(inward, down)), up).to(y.dtype)


def assembled(parts: Mapping[str, Tensor], experts: int) -> Tensor:
    """Return U (d_out, width) of the entries that experts have."""
    index = torch.cat([parts[f"index_{expert}"] for expert in range(experts)])
    values = torch.cat([parts[f"up_{expert}"] for expert in range(experts)])
    return values[index.argsort()].view(-1, len(parts["down"]))


@dataclass(frozen=True)
class Mosa(BesideMaps):
    """Train "28.mlp.down_proj.down" and of each expert ".up_0" (k,), at ".index_0" (k,), flat indices into U."""

    width: int = 64
    experts: int = 4
    form: Literal["series", "parallel"] = "parallel"
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    modules: Modules | Outputs | MlpOutput = "outputs"

    name: ClassVar[str] = "mosa"
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    rate: ClassVar[float] = 3e-3
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    paper: ClassVar[str] = "arXiv 2312.02923"
    kind: ClassVar[Kind] = Kind.ADDITIVE
    formula: ClassVar[Formula] = Formula("map", "width * (d_out + (d_out if form == 'series' else d_in))")

    def __post_init__(self) -> None:
        """Check the ranges, and name what does not train."""
        if self.width < 1 or self.experts < 1:
            raise ValueError(f"width and experts must be at least 1, got {self.width} and {self.experts}")
        object.__setattr__(self, "fixed", frozenset(f"index_{expert}" for expert in range(self.experts)))  # frozen

    @property
    def axes(self) -> Axes:
        """Down from what the map gives, or from what it is given, and entries of up."""
        axes: dict[str, tuple[str, ...]] = {"down": ("width", "rows" if self.form == "series" else "columns")}
        for expert in range(self.experts):
            axes |= {f"index_{expert}": (f"entries_{expert}",), f"up_{expert}": (f"entries_{expert}",)}
        return axes

    def schema(self, start: Adapter) -> Schema:
        """Return values that are averaged, by expert a group, and indices that all sites have in common."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            entries = sum(len(tensor) for part, tensor in parts.items() if part in self.fixed)
            fields[place.key("down")] = Field("F32", tuple(parts["down"].shape), Rule.MEAN)
            for expert in range(self.experts):
                group, size = place.key(str(expert)), (len(parts[f"up_{expert}"]),)
                fields[place.key(f"index_{expert}")] = Field("I32", size, Rule.FIXED, group, below=entries)
                fields[place.key(f"up_{expert}")] = Field("F32", size, Rule.MEAN, group)
        return fields

    def initial(self, place: Place, linear: nn.Module, seed: int) -> Parts:
        """Return a down that is drawn, and an up of zeros, whose entries are dealt out."""
        d_out, d_in = shape(linear)
        inward, random = d_out if self.form == "series" else d_in, generator(seed, place.key("down"))
        parts = {"down": torch.empty(self.width, inward).uniform_(-(inward**-0.5), inward**-0.5, generator=random)}
        order = torch.randperm(d_out * self.width, generator=generator(seed, place.key("experts")))
        for expert, index in enumerate(order.tensor_split(self.experts)):
            parts[f"index_{expert}"] = index.sort().values.int()
            parts[f"up_{expert}"] = torch.zeros(len(index))
        return parts

    def beside(self, linear: nn.Module, parts: Parts) -> Mixed:
        """Return a map with its bottleneck."""
        return Mixed(linear, parts, series=self.form == "series", activation=self.activation)

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map with its tensors; raises ValueError also where the experts' entries are not all of a U."""
        for place, linear, parts in super().fitting(model, maps):
            index = torch.cat([parts[part] for part in sorted(self.fixed)]).cpu().sort().values
            entries = shape(linear)[0] * len(parts["down"])
            if not torch.equal(index.long(), torch.arange(entries)):
                raise ValueError(
                    f"{place.key('index_0')!r} and those of the other experts: expected each of the {entries} entries "
                    "of U once"
                )
            yield place, linear, parts

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "whose entries of U were dealt out otherwise")
        return adapter

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write one dense `bottleneck`, in the format of this project."""
        dense: Adapter = {}
        for place, _, parts in self.fitting(base, self.placed(adapter)):
            dense |= {place.key("down"): parts["down"], place.key("up"): assembled(parts, self.experts)}
        method = Bottleneck(width=self.width, form=self.form, activation=self.activation, modules=self.modules)
        own_format.write(directory, method, dense, base_name=base_name)
