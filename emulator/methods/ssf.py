"""SSF, scaling and shifting features (Lian et al., arXiv 2210.08823): what a map gives is scaled, and shifted.

    y + scale * y + shift   with y = W x + b

A weight takes the scale in, W' = diag(1 + scale) W, and a bias both, b' = (1 + scale) b + shift. These are linear in
what trains: the mean of adapters is the mean of the weights, exactly. A map without a bias is not shifted, for a merged
model would have nowhere to keep that. The paper starts from small random values; here a start changes nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from offsite.emulator.methods.base import Formula, Kind
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts
from offsite.emulator.methods.targets import Modules, Outputs


class Scaled(Beside):
    """A linear map whose output is scaled and, if there is a shift, shifted."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        scale, shift = self.get_parameter("scale"), self._parameters.get("shift")
        change = scale * y.to(scale.dtype)
        return y + (change if shift is None else change + shift).to(y.dtype)


@dataclass(frozen=True)
class Ssf(BesideMaps):
    """Train how much a map's output grows: "28.mlp.down_proj.scale" (d_out,), and ".shift" where it has a bias."""

    modules: Modules | Outputs = "all-linear"

    name: ClassVar[str] = "ssf"
    rate: ClassVar[float] = 5e-3
    paper: ClassVar[str] = "arXiv 2210.08823"
    kind: ClassVar[Kind] = Kind.ADDITIVE
    formula: ClassVar[Formula] = Formula("map", "d_out * (1 + bias)")
    mergeable: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = False

    @property
    def axes(self) -> Axes:
        """One value for each output."""
        return {"scale": ("rows",), "shift": ("rows",)}

    def of_map(self, linear: nn.Module) -> Axes:
        """Return both for a map with a bias."""
        return self.axes if linear.bias is not None else {"scale": ("rows",)}

    def beside(self, linear: nn.Module, parts: Parts) -> Scaled:
        """Return a map that is scaled."""
        return Scaled(linear, parts)

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias."""
        scale = 1 + parts["scale"]
        return scale[:, None] * W, None if b is None else scale * b + parts["shift"]
