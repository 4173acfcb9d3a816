"""How alike the updates of a round are: the cosine of each site's change with the weighted mean of all.

    G_kl = <d_k, d_l>,    cos(d_k, sum_l w_l d_l) = (G w)_k / sqrt(G_kk w'Gw)

d_k is the change of site k since its broadcast. Of products the matrices are compared, through small Gram matrices of
their factors; none is multiplied out. A site whose change points elsewhere than the others' has data unlike theirs, or
means ill; a high cosine says no more than that it agrees with them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offsite.kernels.low_rank import inner, stack
from offsite.kernels.schema import Rule, Schema, TensorMap, factors, groups, rules

COMPARED = frozenset({Rule.MEAN, Rule.PRODUCT, Rule.SUM, Rule.FIXED})


class Change(NamedTuple):
    """A site's update, the broadcast that it began from, and the groups of the schema that it has."""

    update: TensorMap
    broadcast: TensorMap
    groups: frozenset[str]


def gram(changes: Sequence[Change], schema: Schema) -> Tensor | None:
    """Return the inner products (n, n) fp64 of changes; None where a tensor is of no values that can be compared.

    A group of tensors is in memory at a time, of all sites; one that a site has not trained it has not changed.
    """
    if not rules(schema) <= COMPARED:
        return None
    total, products = torch.zeros(len(changes), len(changes), dtype=torch.float64), factors(schema)
    for group, keys in groups(schema).items():
        which = [at for at, change in enumerate(changes) if group in change.groups]
        if not which:
            continue
        some = torch.tensor(which)
        if group in products:
            total[some[:, None], some] += _of_products([changes[at] for at in which], *products[group])
            continue
        for key in keys:
            if schema[key].rule is not Rule.FIXED:
                rows = [changes[at].update[key].double() - changes[at].broadcast[key].double() for at in which]
                flat = torch.stack([row.flatten() for row in rows])
                total[some[:, None], some] += flat @ flat.T
    return total


def _of_products(changes: Sequence[Change], b: str, a: str) -> Tensor:
    pairs = [
        stack([(one.update[b], one.update[a]), (-one.broadcast[b], one.broadcast[a])]) for one in changes
    ]  # the change of the matrix, of twice the rank
    upper = [[inner(pairs[i], pairs[j]) if j >= i else 0.0 for j in range(len(pairs))] for i in range(len(pairs))]
    half = torch.tensor(upper, dtype=torch.float64)
    return half + half.triu(1).T


def with_mean(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """Return the cosine of each change with the weighted mean; 0 where one of them is nothing."""
    w = torch.tensor(weights, dtype=torch.float64)
    along = gram @ w
    lengths = (gram.diagonal() * (w @ along)).clamp(min=0).sqrt()
    return [float(one / length) if length > 0 else 0.0 for one, length in zip(along, lengths, strict=True)]
