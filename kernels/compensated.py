"""Sums of tensors that do not depend on the order of their terms."""

import torch
from torch import Tensor


class Compensated:
    """A running sum of tensors of one shape and dtype, float32 or float64 (Neumaier, 1974).

    Two doubles hold each value, so that what it rounds to does not depend on the order. That is so as long as the terms
    of a value are not 2^50 times apart, of which float32 would not tell the smaller.
    """

    def __init__(self, first: Tensor) -> None:
        """Begin with one term."""
        self._dtype = first.dtype
        self._sum = first.to(torch.float64, copy=True)
        self._lost = torch.zeros_like(self._sum)

    def add(self, term: Tensor) -> None:
        """Add a term; raises ValueError if it has another shape."""
        if term.shape != self._sum.shape:  # torch would broadcast a size of 1
            raise ValueError(f"a sum of terms {list(self._sum.shape)} does not take one of {list(term.shape)}")
        self._sum, lost = two_sum(self._sum, term.double())
        self._lost += lost

    def value(self) -> Tensor:
        """Return the sum in the dtype of its first term."""
        return (self._sum + self._lost).to(self._dtype)


def two_sum(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum of two tensors, and exactly what rounding took from it (Knuth, 1969)."""
    total = one + other
    part = total - one
    return total, (one - (total - part)) + (other - part)
