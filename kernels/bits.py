"""Bits and small integers packed into bytes, the lowest bits of a byte first; the bits left over are zero."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def pack(values: Tensor, width: int = 1) -> Tensor:
    """Store integers (n,) below 2^width in `width` bits each: uint8 (ceil(n * width / 8),) on the CPU."""
    codes = values.detach().to("cpu", torch.uint8)
    bits = (codes[:, None] >> torch.arange(width, dtype=torch.uint8) & 1).flatten()
    of_bytes = functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (of_bytes << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int, width: int = 1) -> Tensor:
    """Return the `count` integers uint8 (count,) that `pack` stored.

    Raises ValueError unless there are as many bytes as they take.
    """
    if len(packed) != -(-count * width // 8):
        raise ValueError(f"{count} values of {width} bits take {-(-count * width // 8)} bytes, there are {len(packed)}")
    bits = np.unpackbits(packed.cpu().numpy(), count=count * width, bitorder="little").reshape(count, width)
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")[:, 0])
