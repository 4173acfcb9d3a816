"""A format: how the matrix of a linear map is stored in fewer bits, as named parts.

Whatever the base's orientation, W is (d_out, d_in) with y = W x. A format is a frozen dataclass of its settings; those
and (d_out, d_in) determine the shapes of all parts, so that a site can check what it gets before it uses it.
"""

from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Parts = dict[str, Tensor]


class Format(Protocol):
    """A way to store a matrix; its fields are its settings."""

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]  # the parts that may train; the others never change

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of every part; raises ValueError if such a matrix cannot be stored."""
        ...

    def decode(self, parts: Mapping[str, Tensor], d_out: int, d_in: int) -> Tensor:
        """Return W (d_out, d_in) fp32; differentiable in the parts that may train."""
        ...

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
        """Return W x + b of x (..., d_in), or W' x of x (..., d_out), in x's dtype; not differentiable."""
        ...
