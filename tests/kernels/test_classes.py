"""Class statistics that add over sites, and Gaussians of them."""

from functools import reduce
from operator import add

import pytest
import torch

from offsite.kernels.classes import ClassSums, class_sums

D, CLASSES = 6, 4


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels; each class has a mean and a covariance of its own, and no row is of the last."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES - 1, (300,), generator=draw)
    mixing = torch.randn(CLASSES, D, D, generator=draw)
    return torch.einsum("nd,ndk->nk", torch.randn(300, D, generator=draw), mixing[labels]) + 10 * labels[
        :, None
    ], labels


def pooled(rows: tuple[torch.Tensor, torch.Tensor]) -> ClassSums:
    features, labels = rows
    sites = zip(features.split([20, 80, 200]), labels.split([20, 80, 200]), strict=True)
    return reduce(add, (class_sums(*site, CLASSES) for site in sites))


def test_means_and_covariances_of_sums_over_sites_are_those_of_all_rows(
    rows: tuple[torch.Tensor, torch.Tensor],
) -> None:
    features, labels = rows
    sums = pooled(rows)
    assert sums.seen.tolist() == [0, 1, 2] and all(tensor.dtype == torch.float64 for tensor in sums)
    for label in range(CLASSES - 1):
        own = features[labels == label].double()
        torch.testing.assert_close(sums.mean(label), own.mean(dim=0), rtol=0, atol=1e-10)
        torch.testing.assert_close(sums.means()[label], own.mean(dim=0), rtol=0, atol=1e-10)
        torch.testing.assert_close(sums.covariance(label), own.T.cov(), rtol=0, atol=1e-9)


def test_what_has_no_rows_has_no_statistics(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    sums = pooled(rows)
    assert not sums.means()[CLASSES - 1].any()
    with pytest.raises(ValueError, match="class 3 has 0 rows"):
        sums.mean(CLASSES - 1)
    with pytest.raises(ValueError, match="class 0 has 1 rows.*at least 2"):
        class_sums(torch.ones(1, D), torch.zeros(1, dtype=torch.int64), 1).covariance(0)


def test_samples_have_the_mean_and_the_covariance_of_the_class(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    sums = pooled(rows)
    sample = sums.sample(1, 40_000, torch.Generator().manual_seed(1))
    scale = sums.covariance(1).diagonal().mean()
    assert float((sample.mean(dim=0) - sums.mean(1)).abs().max()) < 0.05 * float(scale.sqrt())
    assert float((sample.T.cov() - sums.covariance(1)).abs().max()) < 0.05 * float(scale)
    assert torch.equal(sample, sums.sample(1, 40_000, torch.Generator().manual_seed(1)))


def test_two_rows_are_enough_for_a_sample() -> None:
    sums = class_sums(torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]), torch.zeros(2, dtype=torch.int64), 1)
    assert bool(sums.sample(0, 3, torch.Generator().manual_seed(0)).isfinite().all())
