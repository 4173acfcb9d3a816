"""Sketches (SketchTune, arXiv 2410.06364): 4-bit codes that stay, of 16 centroids a row group that may train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offsite.kernels import sketch


@dataclass(frozen=True)
class Sketch:
    """Each row of W is cut into `groups` equal parts with a grid of 16 centroids each."""

    groups: int = 1

    name: ClassVar[str] = "sketch"
    trained: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        """Check the range."""
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return those of codes (d_out, d_in / 2) and grid (d_out, groups, 16); raises ValueError on unequal groups."""
        if d_in % (2 * self.groups):
            raise ValueError(
                f"a matrix ({d_out}, {d_in}) cannot be sketched with groups = {self.groups}: a row must be cut into "
                "equal parts of an even length; use fewer groups"
            )
        codes, grid = (d_out, d_in // 2), (d_out, self.groups, sketch.CENTROIDS)
        return {"codes": (codes, torch.uint8), "grid": (grid, torch.float32)}

    def decode(self, parts: Mapping[str, Tensor], d_out: int, d_in: int) -> Tensor:
        """Return W (d_out, d_in) fp32, differentiable in the grid."""
        return sketch.decode(parts["grid"], parts["codes"])

    def multiply(
        self,
        parts: Mapping[str, Tensor],
        x: Tensor,
        bias: Tensor | None,
        d_out: int,
        d_in: int,
        *,
        transposed: bool = False,
    ) -> Tensor:
        """Return W x + b of x (..., d_in), or W' x of x (..., d_out), in x's dtype."""
        return sketch.multiply(x, bias, parts["grid"], parts["codes"], transposed=transposed)
