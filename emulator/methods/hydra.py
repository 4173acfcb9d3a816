"""Hydra (Kim et al., arXiv 2309.06922): LoRA along a map, for new features, and behind it, to mix those it has.

    y + scale * (B A x + D C y)   with y = W x + b

A weight takes both in, W' = W + scale * (B A + D C W), and a bias the second, b' = b + scale * D C b. W' is linear in
either product, so both are averaged as products; all sites must have the same W, as those of one run do.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.methods.base import Adapter, Formula, Kind
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.targets import Modules, Outputs
from offsite.kernels.schema import Field, Rule, Schema


class Branched(Beside):
    """A linear map with a branch along it and one behind it."""

    def __init__(self, linear: nn.Module, parts: Parts, *, scale: float) -> None:
        """Take the map, the four factors, and what multiplies both products."""
        super().__init__(linear, parts)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        A, B, C, D = (self.get_parameter(part) for part in "ABCD")
        along = functional.linear(functional.linear(x.to(A.dtype), A), B)
        behind = functional.linear(functional.linear(y.to(C.dtype), C), D)
        return y + (self.scale * (along + behind)).to(y.dtype)


@dataclass(frozen=True)
class Hydra(BesideMaps):
    """Two products of one rank: "28.mlp.down_proj.A" (r, d_in), ".B" (d_out, r), ".C" (r, d_out), ".D" (d_out, r)."""

    rank: int = 4
    scale: float = 1.0
    modules: Modules | Outputs = "outputs"

    name: ClassVar[str] = "hydra"
    rate: ClassVar[float] = 3e-3
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT})
    paper: ClassVar[str] = "arXiv 2309.06922"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "rank * (d_in + 3 * d_out)")
    mergeable: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.scale <= 0:
            raise ValueError(f"rank must be at least 1 and scale positive, got {self.rank} and {self.scale}")

    @property
    def behind(self) -> int:
        """The rank of the branch behind; of an average the two may differ."""
        return self.rank

    @property
    def axes(self) -> Axes:
        """Two pairs of factors."""
        return {
            "A": ("rank", "columns"),
            "B": ("rows", "rank"),
            "C": ("behind", "rows"),
            "D": ("rows", "behind"),
        }

    def schema(self, start: Adapter) -> Schema:
        """Return two products a map, whose ranks are open."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            for left, right in ("BA", "DC"):
                group = place.key(left + right)
                fields[place.key(right)] = Field("F32", (None, parts[right].shape[1]), Rule.PRODUCT, group)
                fields[place.key(left)] = Field("F32", (parts[left].shape[0], None), Rule.PRODUCT, group)
        return fields

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return zeros for the left factors, and uniform values for the right ones."""
        bound = size[1] ** -0.5
        return torch.zeros(size) if part in "BD" else torch.empty(size).uniform_(-bound, bound, generator=random)

    def beside(self, linear: nn.Module, parts: Parts) -> Branched:
        """Return a map with both branches."""
        return Branched(linear, parts, scale=self.scale)

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias."""
        A, B, C, D = (parts[part] for part in "ABCD")
        return W + self.scale * (B @ A + D @ (C @ W)), None if b is None else b + self.scale * (D @ (C @ b))
