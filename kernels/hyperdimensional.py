"""Hyperdimensional codes: features as long vectors of -1 and 1, which are bound by products and bundled by sums.

Random projections keep angles in their signs: two features at an angle a have codes that differ at a / pi of all places
in the mean (Charikar, 2002). Bundles are sums of whole numbers, so those of several sites add up to that of all, bit by
bit; their signs, which a majority would leave, do not add.
"""

import torch
from torch import Tensor


def bipolar(*shape: int, generator: torch.Generator) -> Tensor:
    """Return -1 and 1, each as likely, int8, drawn on the CPU."""
    return torch.randint(2, shape, generator=generator, dtype=torch.int8) * 2 - 1


def code(features: Tensor, projection: Tensor) -> Tensor:
    """Return the codes (..., D) of features (..., d): the signs of their projection (D, d), int8, where 0 has 1."""
    return torch.where(features.float() @ projection.T.float() < 0, -1, 1).to(torch.int8)


def bundle(features: list[Tensor], projection: Tensor, keys: list[Tensor]) -> Tensor:
    """Return (n, D) int64: the sum of the codes of several features (n, d) of each of n rows, each bound to a key (D,).

    A code times a key is at right angles to the same code times another, so what one layer says is not taken for what
    another does.
    """
    codes = (code(one, projection) * key for one, key in zip(features, keys, strict=True))
    return torch.stack([one.long() for one in codes]).sum(dim=0)
