"""Bottlenecks beside the maps that layers end in: series (Houlsby et al., arXiv 1902.00751) and parallel ones
(He et al., arXiv 2110.04366), as in LLM-Adapters (Hu et al., arXiv 2304.01933).

    series    y + U f(D y)   with y = W x        D (width, d_out), U (d_out, width)
    parallel  y + U f(D x)                       D (width, d_in),  U (d_out, width)

With `biases` it is U f(D y + d) + u. The sequential adapters of Pfeiffer et al. (arXiv 2005.00052), which learn a
language, are `bottleneck(width=48, activation=relu, biases=true, modules=mlp-output)`: one in a layer, behind the MLP.
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
from offsite.emulator.methods.targets import MlpOutput, Modules, Outputs

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
        inward, parts = (y if self.series else x).to(down.dtype), self.parts
        hidden = self.activation(functional.linear(inward, down, parts.get("down_bias")))
        return y + functional.linear(hidden, up, parts.get("up_bias")).to(y.dtype)


@dataclass(frozen=True)
class Bottleneck(BesideMaps):
    """Bottlenecks of a width: "28.mlp.down_proj.down" and ".up", which is zero at the start.

    With biases there are ".down_bias" (width,) and ".up_bias" (d_out,), both zero at the start, too.
    """

    width: int = 64
    form: Literal["series", "parallel"] = "series"
    activation: Literal["gelu", "relu", "silu", "tanh"] = "tanh"
    modules: Modules | Outputs | MlpOutput = "outputs"
    biases: bool = False

    name: ClassVar[str] = "bottleneck"
    rate: ClassVar[float] = 3e-3
    paper: ClassVar[str] = "arXiv 2304.01933"
    kind: ClassVar[Kind] = Kind.ADDITIVE
    formula: ClassVar[Formula] = Formula(
        "map", "width * (d_out + (d_out if form == 'series' else d_in)) + biases * (width + d_out)"
    )

    def __post_init__(self) -> None:
        """Check the range."""
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    @property
    def axes(self) -> Axes:
        """Down from what the map gives, or from what it is given."""
        projections = {"down": ("width", "rows" if self.form == "series" else "columns"), "up": ("rows", "width")}
        return projections | ({"down_bias": ("width",), "up_bias": ("rows",)} if self.biases else {})

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return uniform values for down, and zeros for all else, so that only up's gradient is not zero at first."""
        if part != "down":
            return torch.zeros(size)
        return torch.empty(size).uniform_(-(size[1] ** -0.5), size[1] ** -0.5, generator=random)

    def beside(self, linear: nn.Module, parts: Parts) -> Passed:
        """Return a map with its bottleneck."""
        return Passed(linear, parts, series=self.form == "series", activation=self.activation)
