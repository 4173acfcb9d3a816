"""Cosines of vectors."""

from torch import Tensor
from torch.nn import functional


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Return (n, m) fp64, the cosine of each row (n, d) and each other vector (m, d); 0 where one of them is zero."""
    return functional.normalize(rows.double(), dim=-1) @ functional.normalize(others.double(), dim=-1).T
