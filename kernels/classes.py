"""Statistics of features by class, in fp64, as sums that add over sites: mean and covariance of the pooled rows.

The mean of sites' covariances is no covariance of all rows where their means differ; the sums lose nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassSums(NamedTuple):
    """Of each of C classes: its rows' number (C,), sum f (C, d) and sum f f^T (C, d, d)."""

    counts: Tensor
    firsts: Tensor
    seconds: Tensor

    def __add__(self, other: tuple[Tensor, ...]) -> "ClassSums":  # type: ignore[override]
        """Return the sums over both; the order of sites changes no more than rounding."""
        return ClassSums(*(one + another for one, another in zip(self, other, strict=True)))

    @property
    def seen(self) -> Tensor:
        """The classes that have a row, in order."""
        return self.counts.nonzero().flatten()

    def mean(self, label: int) -> Tensor:
        """Return a class's mean (d,); raises ValueError if it has no row."""
        self._check(label, 1)
        return self.firsts[label] / self.counts[label]

    def means(self) -> Tensor:
        """Return the means (C, d), zero for a class without a row."""
        return self.firsts / self.counts.clamp(min=1)[:, None]

    def covariance(self, label: int) -> Tensor:
        """Return a class's unbiased covariance (d, d); raises ValueError unless it has two rows."""
        self._check(label, 2)
        count, mean = self.counts[label], self.mean(label)
        return (self.seconds[label] - count * torch.outer(mean, mean)) / (count - 1)

    def sample(self, label: int, rows: int, generator: torch.Generator, *, shrinkage: float = 1e-3) -> Tensor:
        """Draw rows (rows, d) fp64 from a class's Gaussian, on the CPU.

        `shrinkage` of the mean variance is added to the diagonal, so that few rows have a covariance with a root.
        """
        covariance = self.covariance(label).cpu()
        d = len(covariance)
        variance = covariance.diagonal().mean().clamp(min=1e-12)
        root = torch.linalg.cholesky(covariance + shrinkage * variance * torch.eye(d, dtype=torch.float64))
        drawn: Tensor = torch.randn(rows, d, generator=generator, dtype=torch.float64) @ root.T
        return self.mean(label).cpu() + drawn

    def _check(self, label: int, least: int) -> None:
        if self.counts[label] < least:
            raise ValueError(f"class {label} has {int(self.counts[label])} rows, and this takes at least {least}")


def class_sums(features: Tensor, labels: Tensor, classes: int) -> ClassSums:
    """Return the sums of features (n, d) with labels (n,) in 0 .. classes - 1."""
    rows = features.detach().double()
    one_hot = torch.nn.functional.one_hot(labels, classes).to(rows)
    return ClassSums(one_hot.sum(dim=0), one_hot.T @ rows, torch.einsum("nc,nd,ne->cde", one_hot, rows, rows))
