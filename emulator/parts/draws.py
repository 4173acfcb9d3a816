"""Draws that are the same in every process and on every machine: by digests, and no generator of random numbers."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T", int, str)


def drawn(items: Iterable[T], count: int, *draw: object) -> list[T]:
    """Return so many of the items, in ascending order, each set of them as likely as any other.

    They are those whose digests are the smallest; `draw` tells one draw from another.
    """
    return sorted(sorted(items, key=lambda item: _digest(draw, item))[:count])


def weighted(weights: Mapping[T, float], count: int, *draw: object) -> list[T]:
    """Return so many of the items, in ascending order, one after the other with a chance in proportion to its weight.

    As Efraimidis and Spirakis do (Information Processing Letters 97, 2006): each item waits for a time that is
    exponential with its weight as the rate, and the first are taken.
    """

    def time(item: T) -> float:
        uniform = (int.from_bytes(_digest(draw, item)[:6], "big") + 0.5) / (1 << 48)
        return -math.log(uniform) / max(weights[item], 1e-300)

    return sorted(sorted(weights, key=lambda item: (time(item), item))[:count])


def _digest(draw: tuple[object, ...], item: object) -> bytes:
    return hashlib.sha256(repr((*draw, item)).encode()).digest()
