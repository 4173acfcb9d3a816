"""Tensors of one or two bits a value: codes of a normal distribution, and the line that takes codes to values.

    x = mean + deviation * LEVELS[code]

The levels are the medians of the cells of a standard normal, and the cuts between cells the midpoints of neighbouring
levels, which makes the expected absolute error the least; source: Jie et al., arXiv 2307.16867, section 3.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from offsite.kernels.bits import unpack

LEVELS = {1: (-0.6745, 0.6745), 2: (-1.2657, -0.3778, 0.3778, 1.2657)}  # by bits
_ROUNDS = 20  # of codes and a line by turns, each of which errs less; they end sooner
EPSILON = 1e-30  # below any deviation: what divides by one never divides by zero


class Coded(NamedTuple):
    """A tensor of n values: their codes (n,) uint8, and what takes these to values."""

    codes: Tensor
    mean: float
    deviation: float


def decode(coded: Coded, bits: int) -> Tensor:
    """Return the values (n,) in double precision, so that equal codes and lines are equal values."""
    return coded.mean + coded.deviation * _levels(bits, coded.codes.device)[coded.codes.long()]


def read(codes: Tensor, line: Tensor, count: int, bits: int) -> Coded:
    """Return `count` values from packed codes and (mean, deviation) as they are sent; raises ValueError as `unpack`."""
    mean, deviation = line.tolist()
    return Coded(unpack(codes, count, bits), mean, deviation)


def nearest(values: Tensor, mean: Tensor | float, deviation: Tensor | float, bits: int) -> Tensor:
    """Return the codes uint8 of the levels that are nearest to values, of their shape and in their precision."""
    levels = _levels(bits, values.device)
    cuts = ((levels[1:] + levels[:-1]) / 2).to(values.dtype)
    return torch.bucketize((values - mean) / (deviation + EPSILON), cuts).to(torch.uint8)


def encode(values: Tensor, bits: int) -> Coded:
    """Return a tensor (n,) with its own mean and deviation as the line, rounded to fp32."""
    values = values.double()
    mean, deviation = (float(one.float()) for one in (values.mean(), values.std(correction=0)))
    return Coded(nearest(values, mean, deviation, bits), mean, deviation)


def refit(values: Tensor, last: Coded, bits: int) -> Coded:
    """Return a tensor (n,) as the codes and the line, rounded to fp32, that err least, as found from the last ones.

    By turns each value takes the code nearest to it, and the line is fitted by least squares (Lloyd, 1982), until no
    code changes. What `decode` made of the last comes back as it was, bit for bit.
    """
    values, levels, coded = values.double(), _levels(bits, values.device), last
    for _ in range(_ROUNDS):
        codes = nearest(values, coded.mean, coded.deviation, bits)
        level = levels[codes.long()]
        error, centred = values - (coded.mean + coded.deviation * level), level - level.mean()
        more = float((error * centred).sum() / centred.square().sum().clamp_min(EPSILON))
        line = coded.mean + float(error.mean()) - more * float(level.mean()), coded.deviation + more
        fitted = Coded(codes, *torch.tensor(line, dtype=torch.float32).tolist())
        if torch.equal(codes, coded.codes) and fitted[1:] == coded[1:]:
            break
        coded = fitted
    return coded


def _levels(bits: int, device: torch.device) -> Tensor:
    return torch.tensor(LEVELS[bits], dtype=torch.float64, device=device)
