"""Linear centred kernel alignment (Kornblith et al., ICML 2019, arXiv 1905.00414): how alike two representations are.

CKA(X, Y) = ||X'Y||^2 / (||X'X|| ||Y'Y||) with columns centred, Frobenius norms; in [0, 1], blind to rotation and scale.
Representations are (n, d): a row per example. A representation that is the same for all examples is like none: 0.
"""

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA of x (n, d1) and y (n, d2) from their features, in O(n d1 d2); a float64 scalar."""
    x, y = _centred(x), _centred(y)
    return _ratio((x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum())


def linear_cka_gram(x: Tensor, y: Tensor) -> Tensor:
    """Compute the same CKA from Gram matrices, in O(n^2 (d1 + d2)), cheaper for fewer examples than features."""
    return _alignment(_gram(x), _gram(y))


def adjacent_cka(representations: Tensor) -> Tensor:
    """CKA of each layer with the next: (layers, n, d) -> (layers - 1,) float64."""
    layers, n, d = representations.shape
    if n > d:
        links = [linear_cka(x, y) for x, y in zip(representations, representations[1:], strict=False)]
    else:
        grams = [_gram(x) for x in representations]
        links = [_alignment(gram, after) for gram, after in zip(grams, grams[1:], strict=False)]
    return torch.stack(links) if layers > 1 else representations.new_empty(0, dtype=torch.float64)


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(dim=0)


def _gram(x: Tensor) -> Tensor:
    x = _centred(x)
    return x @ x.T


def _alignment(k_x: Tensor, k_y: Tensor) -> Tensor:
    return _ratio((k_x * k_y).sum(), k_x.square().sum(), k_y.square().sum())


def _ratio(cross: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    norm = (xx * yy).sqrt()
    return torch.where(norm > 0, cross / norm, torch.zeros_like(cross))
