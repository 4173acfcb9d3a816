"""MHR, multi-head routing (Caccia et al., arXiv 2211.03831): skills that tasks share, and each mixes for itself.

    A = [sum_s w_hs A_hs]_h    B = [sum_s w_hs B_hs]_h    w_hs = sigmoid(z_hs) / sum_t sigmoid(z_ht)
    W' = W + scale * B A

A skill is LoRA, cut into `heads` along the map's inputs and outputs, and a task has a mixture of them for each head. At
one head it is Poly (Ponti et al., arXiv 2202.13914), and with one skill, too, LoRA. What is a task's own are the logits
z, a few numbers a map: the memory `shard-store` keeps them by task, and with the part `by-task` a new task trains
nothing else, on skills that others have learned (MHR-z).

The papers give z a hundred times the rate of the skills. Here the tensor is z / GAIN, so that a step of an adaptive
optimiser goes that far at one rate. Each tensor is averaged by itself; of mixtures that are multiplied that is not the
mean of the changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Factors, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import Modules, Outputs
from offsite.emulator.outline import NARROWED
from offsite.kernels.schema import Field, Rule, Schema

GAIN = 100.0  # the ratio of the papers' two rates, 0.1 and 1e-3


def shares(routing: Tensor) -> Tensor:
    """Return by how much each skill counts (heads, skills), of what trains of it; each head's sum to one."""
    return functional.logsigmoid(GAIN * routing).softmax(dim=-1)


def mixed(A: Tensor, B: Tensor, routing: Tensor) -> Factors:
    """Return a task's factors A (r, d_in) and B (d_out, r).

    Args:
        A: (heads, skills, r, d_in / heads), of the skills.
        B: (heads, skills, d_out / heads, r), of the skills.
        routing: (heads, skills), the task's.
    """
    w = shares(routing)
    return Factors(
        torch.einsum("hs,hsri->rhi", w, A).flatten(1),
        torch.einsum("hs,hsor->hor", w, B).flatten(0, 1),
    )


class Routed(Beside):
    """A linear map with a product along it, in fp32, whose factors are mixtures."""

    def __init__(self, linear: nn.Module, parts: Parts, *, scale: float) -> None:
        """Take the map, "A", "B" and "routing" as `mixed` does, and the scale."""
        super().__init__(linear, parts)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        A, B = mixed(**self.parts)
        return y + (self.scale * functional.linear(functional.linear(x.to(A.dtype), A), B)).to(y.dtype)


@dataclass(frozen=True)
class Mhr(BesideMaps):
    """Train "28.mlp.down_proj.A" (h, s, r, d_in / h), ".B" (h, s, d_out / h, r) and ".routing" (h, s)."""

    skills: int = 8
    rank: int = 1  # of a skill, and so of a task's product
    heads: int = 4  # which must divide a map's sizes
    alpha: float = 4.0
    modules: Modules | Outputs = "all-linear"

    name: ClassVar[str] = "mhr"
    rate: ClassVar[float] = 3e-3
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    paper: ClassVar[str] = "arXiv 2211.03831"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "skills * (rank * (d_in + d_out) + heads)")
    mergeable: ClassVar[bool] = True
    private: ClassVar[int] = 1  # the routing is a task's own

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.skills, self.rank, self.heads) < 1 or self.alpha <= 0:
            raise ValueError(
                f"skills, rank and heads must be at least 1 and alpha positive, got {self.skills}, {self.rank}, "
                f"{self.heads} and {self.alpha}"
            )

    @property
    def axes(self) -> Axes:
        """The skills' factors, head by head, and the task's logits."""
        return {
            "A": ("heads", "skills", "rank", "head's columns"),
            "B": ("heads", "skills", "head's rows", "rank"),
            "routing": ("heads", "skills"),
        }

    @property
    def scale(self) -> float:
        """What multiplies the products."""
        return self.alpha / self.rank

    def schema(self, start: Adapter) -> Schema:
        """Return tensors that are averaged each by itself, of which the logits are a task's own."""
        return {
            place.key(part): Field(
                "F32", tuple(tensor.shape), Rule.MEAN, private=len(tensor) if part == "routing" else 0
            )
            for place, parts in grouped(start, self.axes).items()
            for part, tensor in parts.items()
        }

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps at each place; raises ValueError also where heads do not divide a map."""
        maps, stack = super().maps(model, places), find(model).layers
        for at, paths in maps.items():
            for path in paths:
                size = shape(stack[at].get_submodule(path))
                if size[0] % self.heads or size[1] % self.heads:
                    raise ValueError(
                        f"{places[at]}.{path} has (d_out, d_in) = {size}, which {self.heads} heads do not divide; set "
                        "heads to a number that divides both, or name other maps as modules"
                    )
        return maps

    def size(self, linear: nn.Module, part: str) -> tuple[int, ...]:
        """Return the shape of a tensor beside a map."""
        d_out, d_in = shape(linear)
        widths = {"A": (self.rank, d_in // self.heads), "B": (d_out // self.heads, self.rank), "routing": ()}
        return (self.heads, self.skills, *widths[part])

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return zeros for B; A as LoRA draws it, and logits within a thousandth."""
        bound = {"A": (self.heads * size[-1]) ** -0.5, "B": 0.0, "routing": 1e-3 / GAIN}[part]
        return torch.empty(size).uniform_(-bound, bound, generator=random)

    def beside(self, linear: nn.Module, parts: Parts) -> Routed:
        """Return a map with its mixture."""
        return Routed(linear, parts, scale=self.scale)

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map with its tensors; raises ValueError also for those of a map of other sizes."""
        for place, linear, parts in super().fitting(model, maps):
            for part, tensor in parts.items():
                if tuple(tensor.shape) != self.size(linear, part):
                    raise ValueError(
                        f"{place.key(part)!r} {tuple(tensor.shape)}: with {self.skills} skills of rank {self.rank} and "
                        f"{self.heads} heads a linear map of (d_out, d_in) = {shape(linear)} has "
                        f"{self.size(linear, part)}"
                    )
            yield place, linear, parts

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return W with the product, and b as it is."""
        A, B = mixed(**parts)
        return W + self.scale * B @ A, b

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "of which other rows and columns are a head's")
        return adapter

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write LoRA of the task's mixture, for `PeftModel.from_pretrained` on the base."""
        pairs = {place: mixed(**parts) for place, _, parts in self.fitting(base, self.placed(adapter))}
        peft_format.write(directory, pairs, dict.fromkeys(pairs, self.scale), base=base, base_name=base_name)
