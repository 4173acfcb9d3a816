"""Compacter (Karimi Mahabadi et al., arXiv 2106.04647): bottlenecks behind maps, made of sums of Kronecker products.

    y + U f(D y + d) + u        D = sum_i A_i (x) s_i t_i'        U = sum_i A_i (x) v_i w_i'        i = 1..terms

with y = W x and f not linear. The A_i (terms, terms) are the same for all maps of all layers, for D as for U: the
paper's slow weights. What a map has of its own are vectors, its fast weights and biases. No layer owns the A_i; in an
adapter they lie at the first map, by name, of the lowest layer.
The paper starts from small values. Here all v_i are zero, so that nothing changes at first, and the others are such
that D has the variance of a bottleneck's. The norms of layers, which the paper trains as well, stay as they are.
No weight takes these in, and the mean over sites is FedAvg's approximation and not exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.methods.base import Adapter, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.bottleneck import ACTIVATIONS
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import Modules, Outputs
from offsite.emulator.outline import NARROWED


class Compact(Beside):
    """A linear map with a bottleneck behind it whose projections are sums of Kronecker products."""

    def __init__(self, linear: nn.Module, parts: Parts, *, activation: str) -> None:
        """Take the map, what trains, and the name of f."""
        super().__init__(linear, parts)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        parts = self.parts
        D, U = (kronecker(parts["slow"], parts[f"{way}_s"], parts[f"{way}_t"]) for way in ("down", "up"))
        hidden = self.activation(functional.linear(y.to(D.dtype), D, parts["down_bias"]))
        return y + functional.linear(hidden, U, parts["up_bias"]).to(y.dtype)


def kronecker(A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return sum_i A_i (x) s_i t_i' (n p, n q), of A (n, n, n), s (n, p) and t (n, q)."""
    n, p, q = len(A), s.shape[1], t.shape[1]
    return torch.einsum("iab,ip,iq->apbq", A, s, t).reshape(n * p, n * q)


@dataclass(frozen=True)
class Compacter(BesideMaps):
    """Train "0.mlp.down_proj.slow" (n, n, n) for all maps, and factors and biases of each.

    They are ".down_s" and ".up_t" (n, width / n), ".down_t" and ".up_s" (n, d_out / n), ".down_bias" (width,) and
    ".up_bias" (d_out,).
    """

    width: int = 16
    terms: int = 4  # n, which divides the width and the maps' rows
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    modules: Modules | Outputs = "outputs"

    name: ClassVar[str] = "compacter"
    rate: ClassVar[float] = 3e-3
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    paper: ClassVar[str] = "arXiv 2106.04647"
    kind: ClassVar[Kind] = Kind.ADDITIVE
    formula: ClassVar[Formula] = Formula("map", "3 * (width + d_out)", once="terms**3")
    common: ClassVar[frozenset[str]] = frozenset({"slow"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.terms < 1 or self.width < 1 or self.width % self.terms:
            raise ValueError(f"width must be a multiple of terms, both at least 1, got {self.width} and {self.terms}")

    @property
    def axes(self) -> Axes:
        """The factors of what is as large as the width, "inner", and of what is as large as the rows, "outer"."""
        return {
            "slow": ("terms", "terms", "terms"),
            "down_s": ("terms", "inner"),
            "down_t": ("terms", "outer"),
            "down_bias": ("width",),
            "up_s": ("terms", "outer"),
            "up_t": ("terms", "inner"),
            "up_bias": ("rows",),
        }

    def size(self, linear: nn.Module, part: str) -> tuple[int, ...]:
        """Return the shape of a tensor beside a map."""
        d_out, n = shape(linear)[0], self.terms
        sizes = {"rows": d_out, "width": self.width, "terms": n, "inner": self.width // n, "outer": d_out // n}
        return tuple(sizes[axis] for axis in self.axes[part])

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps at each place; raises ValueError also where terms do not divide a map's rows."""
        maps = super().maps(model, places)
        for at, paths in maps.items():
            for path in paths:
                if (d_out := shape(find(model).layers[at].get_submodule(path))[0]) % self.terms:
                    raise ValueError(
                        f"{places[at]}.{path} has {d_out} rows, which {self.terms} terms do not divide; set terms to a "
                        "number that divides them, or name other maps as modules"
                    )
        return maps

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return zeros for the biases and for one factor of U, and uniform values, with which D has variance 1 / d_out.

        That is the product of `terms`, of the variance of A, 1 / terms^2, and of those of s, 1, and t, terms / d_out.
        """
        variance = {"slow": self.terms**-2, "down_s": 1.0, "down_t": 1 / size[-1], "up_t": 1 / size[-1]}.get(part, 0.0)
        bound = (3 * variance) ** 0.5
        return torch.empty(size).uniform_(-bound, bound, generator=random) if bound else torch.zeros(size)

    def beside(self, linear: nn.Module, parts: Parts) -> Compact:
        """Return a map with its bottleneck."""
        return Compact(linear, parts, activation=self.activation)

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map of a model, with its tensors; raises ValueError if one does not fit, or if no factors do."""
        for place, linear, parts in super().fitting(model, maps):
            n, inner, outer = len(parts["slow"]), parts["down_s"].shape[1], parts["down_t"].shape[1]
            if (n * inner, n * outer) != (len(parts["down_bias"]), len(parts["up_bias"])):
                raise ValueError(
                    f"{place.layer}.{place.path}: {n} terms of {inner} and {outer} do not make a bottleneck of "
                    f"{len(parts['down_bias'])} behind {len(parts['up_bias'])} rows"
                )
            yield place, linear, parts

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "whose rows the factors of fewer do not tell apart")
        return adapter
