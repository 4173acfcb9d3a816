"""Halves of a low-rank adapter that train apart: the partly learnable projections of Break-for-Make
(Xu et al., arXiv 2403.19456).

    A = [P | D]  (r, d_in)    B = [Q ; U]  (d_out, r)    W' = W + scale * (B A - [Q ; 0] [P | 0])

The first half of A's columns, P, and of B's rows, Q, are an orthonormal basis and stay; the second halves train. Q P is
taken off: it is the same all along, and without it the start, where D and U are zero, changes nothing. While one half
rests W is linear in the other, so that sites that train the same one are averaged exactly; and what sites with
different ones have learned is rejoined as it is. With the part `by-expert` a site trains one half in a round and the
other in the next.

The bases are not sent. In the paper's code each run draws its own, so that halves of two runs do not fit each other;
here they are known by their size alone, cosines with signs that a digest gives, the same in all runs and on all
machines but for the last digits. The paper trains the other half too, at a tenth of the rate, and rejoined ones with a
preconditioner; here one half rests, and rejoined ones train as everything does.
"""

import hashlib
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

GROUPS = {"down": "0", "up": "1"}  # numbers, as experts have them


def basis(rank: int, size: int) -> Tensor:
    """Return orthonormal rows (rank, size), fp32: the first of the DCT-II's, with signs for the columns."""
    row, column = torch.arange(rank, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    rows: Tensor = torch.cos(torch.pi / size * row * (column + 0.5)) * (2 / size) ** 0.5
    rows[0] *= 0.5**0.5
    digest = hashlib.shake_256(f"basis {size}".encode()).digest(size)
    return (rows * torch.tensor([1 - 2 * (byte & 1) for byte in digest])).float()


def rejoined(down: Tensor, up: Tensor, d_out: int, d_in: int) -> Factors:
    """Return what halves change of a map as one product, of factors A (2 r, d_in) and B (d_out, 2 r)."""
    rank = len(down)
    P, Q = basis(rank, d_in // 2).to(down), basis(rank, d_out // 2).to(up).T
    A = torch.cat([torch.cat([torch.zeros_like(P), down], 1), torch.cat([P, down], 1)])
    B = up.new_zeros(d_out, 2 * rank)
    B[: d_out // 2, :rank], B[d_out // 2 :, rank:] = Q, up
    return Factors(A, B)


class Halved(Beside):
    """A linear map with a product along it, in fp32, of whose factors one half each trains."""

    def __init__(self, linear: nn.Module, parts: Parts, *, scale: float) -> None:
        """Take the map, "down" (r, d_in - d_in // 2) and "up" (d_out - d_out // 2, r), and the scale."""
        super().__init__(linear, parts)
        (d_out, d_in), (rank, device) = shape(linear), (len(parts["down"]), parts["down"].device)
        self.scale, self.first = scale, d_in // 2
        self.register_buffer("P", basis(rank, d_in // 2).to(device), persistent=False)
        self.register_buffer("Q", basis(rank, d_out // 2).T.contiguous().to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        down, up = self.get_parameter("down"), self.get_parameter("up")
        inward = x.to(down.dtype)
        learned = functional.linear(inward[..., self.first :], down)
        both = learned + functional.linear(inward[..., : self.first], self.get_buffer("P"))
        change = torch.cat([functional.linear(learned, self.get_buffer("Q")), functional.linear(both, up)], -1)
        return y + (self.scale * change).to(y.dtype)


@dataclass(frozen=True)
class Halves(BesideMaps):
    """Train "28.mlp.down_proj.down" (r, d_in - d_in // 2) and ".up" (d_out - d_out // 2, r), each a group by itself."""

    rank: int = 8
    alpha: float = 16.0
    modules: Modules | Outputs = "all-linear"

    name: ClassVar[str] = "halves"
    rate: ClassVar[float] = 3e-3
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    paper: ClassVar[str] = "arXiv 2403.19456"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "rank * (d_in - d_in // 2 + d_out - d_out // 2)")
    mergeable: ClassVar[bool] = True
    seeded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")

    @property
    def axes(self) -> Axes:
        """The second half of the columns, and of the rows."""
        return {"down": ("rank", "later columns"), "up": ("later rows", "rank")}

    @property
    def scale(self) -> float:
        """What multiplies the products."""
        return self.alpha / self.rank

    def schema(self, start: Adapter) -> Schema:
        """Return values that are averaged, a group by its number for each half."""
        return {
            place.key(part): Field("F32", tuple(tensor.shape), Rule.MEAN, place.key(GROUPS[part]))
            for place, parts in grouped(start, self.axes).items()
            for part, tensor in parts.items()
        }

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps at each place; raises ValueError also where one has too few rows or columns."""
        maps, stack = super().maps(model, places), find(model).layers
        for at, paths in maps.items():
            for path in paths:
                if self.rank > (most := min(shape(stack[at].get_submodule(path))) // 2):
                    raise ValueError(
                        f"rank {self.rank} is more than half of {places[at]}.{path} has rows or columns, {most}, so "
                        "that no basis has as many; lower rank, or name other maps as modules"
                    )
        return maps

    def size(self, linear: nn.Module, part: str) -> tuple[int, ...]:
        """Return the shape of a half that trains."""
        d_out, d_in = shape(linear)
        return (self.rank, d_in - d_in // 2) if part == "down" else (d_out - d_out // 2, self.rank)

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return zeros: each half meets the basis of the other factor, so that both have a gradient."""
        return torch.zeros(size)

    def beside(self, linear: nn.Module, parts: Parts) -> Halved:
        """Return a map with both halves."""
        return Halved(linear, parts, scale=self.scale)

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map with its halves; raises ValueError also for those of a map of other sizes, or another rank."""
        for place, linear, parts in super().fitting(model, maps):
            for part, tensor in parts.items():
                if tuple(tensor.shape) != self.size(linear, part):
                    raise ValueError(
                        f"{place.key(part)!r} {tuple(tensor.shape)}: at rank {self.rank} a linear map of "
                        f"(d_out, d_in) = {shape(linear)} has {self.size(linear, part)}"
                    )
            yield place, linear, parts

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return W with scale * B @ A without the product of the bases, and b as it is."""
        A, B = rejoined(parts["down"], parts["up"], *W.shape)
        return W + self.scale * B @ A, b

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "of which other rows and columns are the second half")
        return adapter

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write LoRA of twice the rank, for `PeftModel.from_pretrained` on the base."""
        pairs = {
            place: rejoined(parts["down"], parts["up"], *shape(linear))
            for place, linear, parts in self.fitting(base, self.placed(adapter))
        }
        peft_format.write(directory, pairs, dict.fromkeys(pairs, self.scale), base=base, base_name=base_name)
