"""Counts of hashed n-grams, and TF-IDF of their sums."""

import torch
from sklearn.feature_extraction.text import TfidfTransformer
from torch.nn import functional

from offsite.kernels import signatures

TEXTS = [[5, 7, 5], [7, 7, 9, 4], [5], [3, 4, 9, 4, 9]]


def counted(texts: list[list[int]], salt: bytes = b"s", buckets: int = 512) -> torch.Tensor:
    return signatures.counts(texts, ngram=2, buckets=buckets, salt=salt)


def test_every_n_gram_is_counted_once_in_the_bucket_that_the_salt_says() -> None:
    rows = counted(TEXTS)
    assert rows.sum(dim=1).tolist() == [5, 7, 1, 9]  # a text of t tokens has t of one, and t - 1 of two
    at = [signatures.bucket(term, buckets=512, salt=b"s") for term in ((5,), (7,), (5, 7), (7, 5))]
    assert len({*at}) == 4 and rows[0, at].tolist() == [2, 1, 1, 1]
    assert not torch.equal(counted(TEXTS, salt=b"other"), rows)
    assert signatures.bucket((57,), buckets=2**40, salt=b"") != signatures.bucket((5, 7), buckets=2**40, salt=b"")


def test_no_text_has_no_counts() -> None:
    assert counted([]).shape == (0, 512)
    assert not counted([[]]).any()


def test_tf_idf_of_sums_over_sites_is_that_of_all_texts() -> None:
    rows = counted(TEXTS, buckets=16)  # some n-grams collide
    documents = sum((counted(site, buckets=16) > 0).double().sum(dim=0) for site in (TEXTS[:1], TEXTS[1:]))
    mine = functional.normalize(signatures.tf_idf(rows, documents, torch.tensor([4.0])), dim=-1)
    theirs = torch.from_numpy(TfidfTransformer().fit_transform(rows.numpy()).toarray())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
