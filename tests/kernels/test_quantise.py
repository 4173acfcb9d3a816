import pytest
import torch
from torch import Tensor

from offsite.kernels.quantise import INT4_LEVELS, NF4_LEVELS, dequantise, pack_nibbles, quantise, unpack_nibbles

LEVELS = {"nf4": NF4_LEVELS, "int4": INT4_LEVELS}


@pytest.fixture(params=LEVELS)
def levels(request: pytest.FixtureRequest) -> tuple[float, ...]:
    return LEVELS[request.param]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def restored(weight: Tensor, levels: tuple[float, ...], block: int) -> Tensor:
    packed, scales = quantise(weight, levels, block=block)
    return dequantise(packed, scales, levels, d_in=weight.shape[1], block=block)


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
def test_codes_come_back_exactly_also_when_their_number_is_odd(count: int) -> None:
    codes = torch.randint(0, 16, (3, 5, count), generator=torch.Generator().manual_seed(0)).byte()
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, (count + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, count), codes)


def test_the_first_of_two_codes_is_in_the_lower_half_of_its_byte() -> None:
    assert pack_nibbles(torch.tensor([1, 2, 15])).tolist() == [0x21, 0x0F]


def test_nf4_levels_are_the_quantiles_of_the_papers_construction() -> None:
    """Appendix E: two sets of quantiles between 1/2 (1/32 + 1/30) and 1/2, one of 8 and one of 9, over the largest."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    above = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    torch.testing.assert_close(found / found.max(), torch.tensor(NF4_LEVELS, dtype=torch.float64), rtol=0, atol=2e-5)


def test_int4_levels_are_multiples_of_a_seventh() -> None:
    assert [round(7 * level) for level in INT4_LEVELS] == list(range(-8, 8))


@pytest.mark.parametrize(("d_in", "block"), [(24, 8), (21, 8), (8, 8), (5, 64)])
def test_a_matrix_of_levels_times_scales_is_stored_exactly(levels: tuple[float, ...], d_in: int, block: int) -> None:
    draw = torch.Generator().manual_seed(1)
    inside = [level for level in levels if level >= -1]
    codes = torch.randint(0, len(inside), (6, d_in), generator=draw)
    codes[:, ::block] = len(inside) - 1  # each block reaches its scale
    scales = (torch.rand(6, -(-d_in // block), generator=draw) + 0.5).half().float()
    top = torch.tensor(inside)[-1]
    weight = torch.tensor(inside)[codes] / top * scales.repeat_interleave(block, dim=1)[:, :d_in]
    torch.testing.assert_close(restored(weight, levels, block), weight, rtol=0, atol=0)


@pytest.mark.parametrize(("d_in", "block"), [(64, 16), (50, 16), (33, 1), (10, 64)])
def test_each_entry_takes_the_nearest_level_under_its_blocks_scale(
    levels: tuple[float, ...], d_in: int, block: int
) -> None:
    weight = normal(12, d_in)
    largest = torch.stack([part.abs().amax(dim=1) for part in weight.split(block, dim=1)], dim=1).half().float()
    scale = largest.repeat_interleave(block, dim=1)[:, :d_in]
    nearest = (weight[..., None] / scale[..., None] - torch.tensor(levels)).abs().argmin(dim=-1)
    expected = torch.tensor(levels)[nearest] * scale
    torch.testing.assert_close(restored(weight, levels, block), expected, rtol=0, atol=0)


def test_a_block_of_zeros_is_stored_as_zeros_and_small_blocks_keep_their_scale(levels: tuple[float, ...]) -> None:
    weight = normal(4, 32)
    weight[:, 8:16] = 0
    weight[:, 16:24] *= 1e-5  # below the least normal fp16 number
    weight[:, 24:] = 1e-9  # below the least of all
    found = restored(weight, levels, 8)
    assert (found[:, 8:16] == 0).all() and (found[:, 24:] == 0).all()
    codes = unpack_nibbles(quantise(weight, levels, block=8)[0], 32)
    assert (torch.tensor(levels)[codes[:, 8:16].long()] == 0).all()
    small = found[:, 16:24] - weight[:, 16:24]
    assert 0 < float(small.norm() / weight[:, 16:24].norm()) < 0.15


def test_nf4_of_normal_weights_loses_less_than_int4_and_both_stay_in_bounds() -> None:
    weight = normal(64, 1024)
    loss = {
        name: float((restored(weight, levels, 64) - weight).norm() / weight.norm()) for name, levels in LEVELS.items()
    }
    assert loss["nf4"] < loss["int4"] < 0.12
    assert loss["nf4"] < 0.10


def test_a_weight_that_fp16_scales_cannot_reach_is_refused(levels: tuple[float, ...]) -> None:
    for value in (1e5, float("nan"), float("inf")):
        weight = normal(2, 8)
        weight[1, 3] = value
        with pytest.raises(ValueError, match="cannot be quantised"):
            quantise(weight, levels, block=4)


def test_half_precision_weights_are_quantised_as_their_values_are(levels: tuple[float, ...]) -> None:
    weight = normal(4, 24).bfloat16()
    assert torch.equal(restored(weight, levels, 8), restored(weight.float(), levels, 8))
