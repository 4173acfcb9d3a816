from collections.abc import Callable

import pytest
import torch

from offsite.kernels.cka import adjacent_cka, linear_cka, linear_cka_gram


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "d"), [(50, 8), (8, 50), (20, 20)])
def test_both_forms_agree(n: int, d: int) -> None:
    x, y = drawn(n, d), drawn(n, d + 3, seed=1)
    y[:, :d] += x
    torch.testing.assert_close(linear_cka(x, y), linear_cka_gram(x, y), rtol=0, atol=1e-12)
    assert 0.01 < float(linear_cka(x, y)) < 0.99


@pytest.mark.parametrize("cka", [linear_cka, linear_cka_gram])
def test_a_representation_is_like_itself_rotated_scaled_and_moved(
    cka: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    x, y = drawn(30, 6) + 5, drawn(30, 9, seed=1)
    rotation, _ = torch.linalg.qr(drawn(6, 6, seed=2))
    torch.testing.assert_close(cka(x, x), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(cka(x @ rotation * 7 - 3, y), cka(x, y), rtol=0, atol=1e-12)


def test_it_is_the_centred_alignment_of_the_definition() -> None:
    x, y = drawn(12, 4), drawn(12, 5, seed=1)
    centre = torch.eye(12, dtype=torch.float64) - 1 / 12

    def hsic(k: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.trace(centre @ k @ centre @ other)

    k, other = x @ x.T, y @ y.T
    expected = hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt()
    torch.testing.assert_close(linear_cka(x, y), expected, rtol=0, atol=1e-12)


def test_independent_representations_are_unlike_and_constant_ones_are_like_nothing() -> None:
    assert float(linear_cka(drawn(4000, 3), drawn(4000, 3, seed=1))) < 0.01
    assert float(linear_cka(torch.ones(10, 3), drawn(10, 3))) == 0.0


@pytest.mark.parametrize(("n", "d"), [(40, 6), (6, 40)])
def test_the_links_of_a_chain_are_those_of_its_neighbours(n: int, d: int) -> None:
    chain = drawn(5, n, d)
    links = adjacent_cka(chain)
    assert links.shape == (4,)
    for at in range(4):
        torch.testing.assert_close(links[at], linear_cka(chain[at], chain[at + 1]), rtol=0, atol=1e-12)
    assert adjacent_cka(chain[:1]).shape == (0,)
