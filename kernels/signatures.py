"""Signatures of texts: how often hashed n-grams of tokens occur, and their TF-IDF, formed of sums that add over sites.

Instruction codebooks compare texts so (Large Continual Instruction Assistant, arXiv 2410.10868). TF-IDF is
tf * (ln((1 + n) / (1 + df)) + 1), of n documents of which df have the term, as scikit-learn has it with `smooth_idf`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def bucket(term: Sequence[int], *, buckets: int, salt: bytes) -> int:
    """Return the bucket of an n-gram: BLAKE2b keyed by the salt, at most 64 bytes, without which nobody can tell."""
    text = b",".join(b"%d" % token for token in term)
    return int.from_bytes(blake2b(text, key=salt, digest_size=8).digest()) % buckets


def counts(texts: Iterable[Sequence[int]], *, ngram: int, buckets: int, salt: bytes) -> Tensor:
    """Return (texts, buckets) fp64: how often n-grams of 1 .. `ngram` tokens of each text fall into each bucket."""
    rows = []
    for text in texts:
        terms = (tuple(text[at : at + n]) for n in range(1, ngram + 1) for at in range(len(text) - n + 1))
        row = torch.zeros(buckets, dtype=torch.float64)
        for term, count in Counter(terms).items():
            row[bucket(term, buckets=buckets, salt=salt)] += count
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, buckets, dtype=torch.float64)


def tf_idf(terms: Tensor, documents: Tensor, count: Tensor) -> Tensor:
    """Return TF-IDF (..., buckets) of terms (..., buckets), given how many of `count` documents (1,) have each.

    `documents` (buckets,) says that by bucket.
    """
    return terms * (((1 + count) / (1 + documents)).log() + 1)
