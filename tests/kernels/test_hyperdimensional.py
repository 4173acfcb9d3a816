"""Codes that keep angles, keys that keep layers apart, and bundles that add."""

import math

import pytest
import torch

from offsite.kernels.cosines import cosines
from offsite.kernels.hyperdimensional import bipolar, bundle, code

SIZE, WIDTH = 16384, 24


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def projection() -> torch.Tensor:
    return bipolar(SIZE, WIDTH, generator=drawn(0))


def test_draws_are_minus_one_and_one_in_equal_shares(projection: torch.Tensor) -> None:
    assert {*projection.unique().tolist()} == {-1, 1} and projection.dtype == torch.int8
    assert abs(float(projection.float().mean())) < 0.01
    assert torch.equal(projection, bipolar(SIZE, WIDTH, generator=drawn(0)))


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, math.pi / 2, 2.5])
def test_codes_differ_at_as_many_places_as_the_angle_says(projection: torch.Tensor, angle: float) -> None:
    plane = torch.linalg.qr(torch.randn(WIDTH, 2, generator=drawn(1))).Q.T
    pair = torch.stack([plane[0], math.cos(angle) * plane[0] + math.sin(angle) * plane[1]])
    one, other = code(3.0 * pair, projection)
    assert abs(float((one != other).float().mean()) - angle / math.pi) < 0.03


def test_a_key_turns_a_code_away_from_itself_and_bundles_are_sums_of_whole_numbers(projection: torch.Tensor) -> None:
    features = torch.randn(5, WIDTH, generator=drawn(2))
    keys = [bipolar(SIZE, generator=drawn(seed)) for seed in (3, 4)]
    apart = [bundle([features], projection, [key]) for key in keys]
    assert float(cosines(*apart).diagonal().abs().max()) < 0.05
    both = bundle([features, features], projection, keys)
    assert both.dtype == torch.int64 and torch.equal(both, apart[0] + apart[1])
    assert torch.equal(both.sum(dim=0), both[:2].sum(dim=0) + both[2:].sum(dim=0))


def test_zero_has_a_code_and_no_cosine(projection: torch.Tensor) -> None:
    assert bool((code(torch.zeros(1, WIDTH), projection) == 1).all())
    assert cosines(torch.zeros(1, 3), torch.ones(1, 3)).item() == 0
