"""Values in one or two bits: codes that come back as they were, and lines that err no more than others."""

from math import erf, sqrt

import pytest
import torch
from torch import Tensor

from offsite.kernels.bits import pack
from offsite.kernels.coded import LEVELS, Coded, decode, encode, nearest, read, refit


def drawn(count: int = 4000, *, seed: int = 0) -> Tensor:
    return 0.3 + 2 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def error(values: Tensor, coded: Coded, bits: int) -> float:
    return float((values.double() - decode(coded, bits)).square().sum())


def same(one: Coded, other: Coded) -> bool:
    return torch.equal(one.codes, other.codes) and one[1:] == other[1:]


@pytest.mark.parametrize("bits", [1, 2])
def test_a_level_is_the_median_of_its_cell_of_a_standard_normal(bits: int) -> None:
    levels = LEVELS[bits]
    cuts = [-9.0, *((one + other) / 2 for one, other in zip(levels, levels[1:], strict=False)), 9.0]

    def below(x: float) -> float:
        return (1 + erf(x / sqrt(2))) / 2

    for level, low, high in zip(levels, cuts, cuts[1:], strict=False):
        assert below(level) == pytest.approx((below(low) + below(high)) / 2, abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2])
def test_values_take_the_nearest_code_under_their_own_mean_and_deviation(bits: int) -> None:
    values = drawn()
    coded = encode(values, bits)
    assert (coded.mean, coded.deviation) == pytest.approx((float(values.mean()), float(values.std(correction=0))))
    levels = coded.mean + coded.deviation * torch.tensor(LEVELS[bits], dtype=torch.float64)
    assert torch.equal((values[:, None] - levels).abs().argmin(1).to(torch.uint8), coded.codes)
    assert error(values, encode(values, 2), 2) < error(values, encode(values, 1), 1) < float(values.square().sum())


@pytest.mark.parametrize("bits", [1, 2])
def test_what_was_decoded_is_encoded_as_it_was_bit_for_bit(bits: int) -> None:
    for seed in range(5):
        coded = encode(drawn(50, seed=seed), bits)
        again = refit(decode(coded, bits), coded, bits)
        assert same(again, coded) and torch.equal(decode(again, bits), decode(coded, bits))
        assert torch.equal(nearest(decode(coded, bits), coded.mean, coded.deviation, bits), coded.codes)


@pytest.mark.parametrize("bits", [1, 2])
def test_a_line_that_is_fitted_errs_least(bits: int) -> None:
    values = drawn()
    first = encode(values, bits)
    fitted = refit(values, first, bits)
    assert error(values, fitted, bits) < error(values, first, bits)
    for mean, deviation in ((1e-3, 0.0), (-1e-3, 0.0), (0.0, 1e-3), (0.0, -1e-3)):
        other = Coded(fitted.codes, fitted.mean + mean, fitted.deviation + deviation)
        assert error(values, other, bits) > error(values, fitted, bits)


def test_values_without_a_deviation_and_codes_of_one_kind_stay_finite() -> None:
    for values in (torch.zeros(9), torch.full((9,), 3.0)):
        for bits in LEVELS:
            coded = refit(values, encode(values, bits), bits)
            torch.testing.assert_close(decode(coded, bits).float(), values)


def test_codes_are_read_as_they_are_sent() -> None:
    coded = encode(drawn(21), 2)
    line = torch.tensor(coded[1:])
    assert same(read(pack(coded.codes, 2), line, 21, 2), coded)
    with pytest.raises(ValueError, match="21 values of 2 bits take 6 bytes, there are 5"):
        read(pack(coded.codes, 2)[:-1], line, 21, 2)
