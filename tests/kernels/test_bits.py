"""Bits and small integers in bytes: what is stored is read again, in as few bytes as it takes."""

import pytest
import torch

from offsite.kernels.bits import pack, unpack


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_what_is_packed_is_unpacked_and_takes_no_byte_more(width: int, count: int) -> None:
    values = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = pack(values, width)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * width // 8)
    assert torch.equal(unpack(packed, count, width), values)


def test_the_lowest_bit_of_a_byte_comes_first_and_what_is_left_over_is_zero() -> None:
    assert pack(torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1])).tolist() == [0b1101, 1]
    assert pack(torch.tensor([3, 1, 2]), 2).tolist() == [0b10_01_11]


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="9 values of 1 bits take 2 bytes, there are 1"):
        unpack(torch.zeros(1, dtype=torch.uint8), 9)
