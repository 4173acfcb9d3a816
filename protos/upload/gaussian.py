"""Gaussian noise on tensors, from a key."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from offsite.kernels.schema import Tensors
from offsite.protos.security.draws import derive, stream

PIECE = 1 << 20  # values that are drawn at a time
BITS = 23  # of a uniform number: with half a step added it still fits the 24 of a float32


def noisy(tensors: Tensors, share: float, *, key: bytes) -> Tensors:
    """Add noise of a share of the root mean square of all values; the same to the same tensors, by the same key."""
    squares = sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors.values())
    if not squares:
        return tensors
    deviation = share * math.sqrt(squares / sum(tensor.numel() for tensor in tensors.values()))
    read = stream(derive(key, _digest(tensors)))
    return {name: _plus(tensor, deviation, read) for name, tensor in tensors.items()}


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plus(tensor: Tensor, deviation: float, read: Callable[[int], bytes]) -> Tensor:
    total = tensor.flatten().clone()
    for piece in torch.split(total, PIECE):
        piece += deviation * _normal(len(piece), read)
    return total.view(tensor.shape)


def _normal(count: int, read: Callable[[int], bytes]) -> Tensor:
    """Draw float32 (count,) from the standard normal distribution, as Box and Muller do (1958)."""
    half = (count + 1) // 2
    bits = torch.frombuffer(bytearray(read(8 * half)), dtype=torch.int32) & ((1 << BITS) - 1)
    uniform, turn = torch.split((bits.float() + 0.5) / (1 << BITS), half)
    radius, angle = (-2 * uniform.log()).sqrt(), 2 * math.pi * turn
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
