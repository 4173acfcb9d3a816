"""Additive codebooks (AQLM, arXiv 2401.06118): a group of inputs is the sum of M vectors, one of each codebook."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from offsite.emulator.formats.base import Parts
from offsite.kernels import codebook
from offsite.kernels.quantise import pack_nibbles

_FLOOR = 1e-6  # importance of an input that is always zero, as a share of the mean


@dataclass(frozen=True)
class Additive:
    """`codebooks` codes of `bits` bits for each `group` entries of a row, and a scale for the row; 2 bits by default.

    Codebooks and scales may train, for which they should be fp32.
    """

    group: int = 8
    codebooks: int = 2
    bits: Literal[4, 8] = 8
    precision: Literal["float16", "float32"] = "float16"

    name: ClassVar[str] = "additive"
    trained: ClassVar[tuple[str, ...]] = ("codebooks", "scales")

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.group < 1 or self.codebooks < 1:
            raise ValueError(f"group and codebooks must be at least 1, got {self.group} and {self.codebooks}")

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return those of codes (bytes,), codebooks (M, 2^bits, group) and scales (d_out,).

        Raises ValueError if a row cannot be cut into groups.
        """
        if d_in % self.group:
            raise ValueError(
                f"a matrix ({d_out}, {d_in}) cannot be stored in additive codebooks with group = {self.group}: a row "
                "must be cut into whole groups; choose a group that divides the row"
            )
        count, dtype = d_out * (d_in // self.group) * self.codebooks, getattr(torch, self.precision)
        return {
            "codes": ((-(-count * self.bits // 8),), torch.uint8),
            "codebooks": ((self.codebooks, 2**self.bits, self.group), dtype),
            "scales": ((d_out,), dtype),
        }

    def encode(self, weight: Tensor, importance: Tensor, generator: torch.Generator) -> Parts:
        """Store W (d_out, d_in), an error counting by the `importance` (d_in,) of its input; `generator` is a CPU's."""
        d_out, d_in = weight.shape
        weight, shapes = weight.float(), self.shapes(d_out, d_in)
        scales = weight.square().mean(dim=1).sqrt().clamp(min=1e-12)
        relative = importance.float() / importance.float().mean().clamp(min=1e-12) + _FLOOR
        relevant = scales / scales.square().mean().sqrt()
        weights = (relevant.square()[:, None] * relative).view(-1, self.group)
        groups = (weight / scales[:, None]).view(-1, self.group)
        books = codebook.fit(groups, codebooks=self.codebooks, bits=self.bits, generator=generator, weights=weights)
        codes = codebook.encode(groups, books, weights=weights)
        parts = {"codes": self.pack(codes), "codebooks": books, "scales": scales}
        return {name: part.to(shapes[name][1]) for name, part in parts.items()}

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes (n, M) uint8 as bytes."""
        return pack_nibbles(codes.flatten()) if self.bits == 4 else codes.flatten()

    def unpack(self, packed: Tensor, groups: int) -> Tensor:
        """Return the codes (n, M) uint8 of n groups."""
        return codebook.unpack(packed, self.codebooks, bits=self.bits, groups=groups)

    def decode(self, parts: Mapping[str, Tensor], d_out: int, d_in: int) -> Tensor:
        """Return W (d_out, d_in) fp32, differentiable in the codebooks and the scales."""
        return codebook.matrix(parts["codes"], parts["codebooks"], parts["scales"], d_in=d_in, bits=self.bits)

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
        codes, books, scales = (parts[name] for name in ("codes", "codebooks", "scales"))
        return codebook.multiply(x, bias, codes, books, scales, d_in=d_in, bits=self.bits, transposed=transposed)
