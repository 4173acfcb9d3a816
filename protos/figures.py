"""The one way in which likelihoods become the perplexities that people compare."""

import math
from collections.abc import Iterable
from typing import Any


def perplexity(sets: Iterable[dict[str, Any]]) -> float:
    """Perplexity over all tokens of several sets, each {"nll": nats, "tokens": count}; capped where floats end."""
    nll, tokens = (sum(column) for column in zip(*((one["nll"], one["tokens"]) for one in sets), strict=True))
    return math.exp(min(nll / tokens, 700.0))
