"""Bottlenecks beside the maps that layers end in: series (Houlsby et al., arXiv 1902.00751) and parallel ones
(He et al., arXiv 2110.04366), as in LLM-Adapters (Hu et al., arXiv 2304.01933).

    series    y + U f(D y)   with y = W x        D (width, d_out), U (d_out, width)
    parallel  y + U f(D x)                       D (width, d_in),  U (d_out, width)

f is not linear, so no weight takes them in, and the mean over sites is FedAvg's approximation and not exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.methods.base import Formula, Kind
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts
from offsite.emulator.methods.targets import Modules, Outputs

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Passed(Beside):
    """A linear map with a bottleneck behind it, or along it."""

    def __init__(self, linear: nn.Module, parts: Parts, *, series: bool, activation: str) -> None:
        """Take the map, both projections, and where the bottleneck is."""
        super().__init__(linear, parts)
        self.series, self.activation = series, ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        down, up = self.get_parameter("down"), self.get_parameter("up")
        inward = (y if self.series else x).to(down.dtype)
        return y + functional.linear(self.activation(functional.linear(inward, down)), up).to(y.dtype)


@dataclass(frozen=True)
class Bottleneck(BesideMaps):
    """Bottlenecks of a width, without biases: "28.mlp.down_proj.down" and ".up", which is zero at the start."""

    width: int = 64
    form: Literal["series", "parallel"] = "series"
    activation: Literal["gelu", "relu", "silu", "tanh"] = "tanh"
    modules: Modules | Outputs = "outputs"

    name: ClassVar[str] = "bottleneck"
    rate: ClassVar[float] = 3e-3
    paper: ClassVar[str] = "arXiv 2304.01933"
    kind: ClassVar[Kind] = Kind.ADDITIVE
    formula: ClassVar[Formula] = Formula("map", "width * (d_out + (d_out if form == 'series' else d_in))")

    def __post_init__(self) -> None:
        """Check the range."""
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    @property
    def axes(self) -> Axes:
        """Down from what the map gives, or from what it is given."""
        return {"down": ("width", "rows" if self.form == "series" else "columns"), "up": ("rows", "width")}

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return zeros for up, so that only its gradient is zero where it starts, and uniform values for down."""
        bound = size[1] ** -0.5
        return torch.zeros(size) if part == "up" else torch.empty(size).uniform_(-bound, bound, generator=random)

    def beside(self, linear: nn.Module, parts: Parts) -> Passed:
        """Return a map with its bottleneck."""
        return Passed(linear, parts, series=self.form == "series", activation=self.activation)
