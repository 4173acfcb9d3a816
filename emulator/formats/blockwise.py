"""What the formats of 16 fixed levels have in common: packed codes, and a scale for every block of a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offsite.emulator.formats.base import Parts
from offsite.kernels.quantise import dequantise, multiply, quantise


@dataclass(frozen=True)
class Blockwise:
    """4 bits an entry and an fp16 scale for each `block` entries of a row; one for the row if it is shorter."""

    block: int = 64

    name: ClassVar[str]
    levels: ClassVar[tuple[float, ...]]
    trained: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the range."""
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shapes and dtypes of `codes`, two to a byte, and `scales`."""
        return {
            "codes": ((d_out, -(-d_in // 2)), torch.uint8),
            "scales": ((d_out, -(-d_in // self.block)), torch.float16),
        }

    def encode(self, weight: Tensor) -> Parts:
        """Store W (d_out, d_in), each entry as the nearest level; raises ValueError if an entry exceeds fp16."""
        codes, scales = quantise(weight, self.levels, block=self.block)
        return {"codes": codes, "scales": scales}

    def decode(self, parts: Mapping[str, Tensor], d_out: int, d_in: int) -> Tensor:
        """Return W (d_out, d_in) fp32."""
        return dequantise(parts["codes"], parts["scales"], self.levels, d_in=d_in, block=self.block)

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
        matrix = parts["codes"], parts["scales"], self.levels
        return multiply(x, bias, *matrix, d_in=d_in, block=self.block, transposed=transposed)
