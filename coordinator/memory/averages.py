"""Averages of two versions' adapters, each group as its rule says: products as products, and not factor by factor."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from offsite.coordinator.memory.base import Moment
from offsite.kernels.low_rank import Pair, Total, split
from offsite.kernels.schema import Rule, Schema, Tensors, factors, groups

RULES: frozenset[Rule] = frozenset({Rule.PRODUCT, Rule.MEAN, Rule.FIXED})


class Averaging:
    """What a memory declares that averages."""

    rules: ClassVar[frozenset[Rule]] = RULES
    accumulates: ClassVar[bool] = True
    paced: ClassVar[bool] = True
    divides: ClassVar[bool] = False


def kept(c: float, moment: Moment) -> float:
    """Return (1 - c / N)^k, what a round of k steps leaves of an average, of N in its run; 0 where N is at most c."""
    steps = moment.rounds * moment.steps
    return float(max(0.0, 1.0 - c / steps) ** moment.steps)


def moving(schema: Schema) -> list[str]:
    """Return the groups of a schema that change over the rounds."""
    return [group for group, keys in groups(schema).items() if any(schema[key].rule is not Rule.FIXED for key in keys)]


def average(old: Tensors, new: Tensors, shares: Mapping[str, float], schema: Schema, *, rank: int = 0) -> Tensors:
    """Return (1 - share) old + share new, with the share of each group that moves; what is fixed is the new one's.

    A product has the ranks of both together, at most those of its matrix; with a `rank` above 0 the best approximation
    at that one, where it has more (Eckart-Young).
    """
    pairs = factors(schema)
    averages = Tensors()
    for group, keys in groups(schema).items():
        if group in pairs:
            b, a = pairs[group]
            averages[b], averages[a] = _product((old[b], old[a]), (new[b], new[a]), shares[group], rank)
        else:
            for key in keys:
                fixed = schema[key].rule is Rule.FIXED
                averages[key] = new[key] if fixed else _mean(old[key], new[key], shares[group])
    return averages


def _product(old: Pair, new: Pair, share: float, rank: int) -> Pair:
    total = Total()
    for pair, weight in ((old, 1.0 - share), (new, share)):
        if weight and pair[0].shape[1]:
            total.add(pair, weight)
    pair = total.pair()
    return split(pair, rank, svd=total.svd())[0] if 0 < rank < pair[0].shape[1] else pair


def _mean(old: Tensor, new: Tensor, share: float) -> Tensor:
    return ((1.0 - share) * old.double() + share * new.double()).to(new.dtype)
