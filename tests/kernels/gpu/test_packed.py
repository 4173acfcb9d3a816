"""Triton's products with matrices in few bits, beside their references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.kernels import codebook, quantise, sketch
from offsite.kernels.device import twin

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytestmark = pytest.mark.slow(alone=True)  # as the interpreter is; CI runs them

Case = tuple[Any, tuple[Any, ...], dict[str, int]]  # a reference, the parts of a matrix, and its settings


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(*shape: int, most: int = 256) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def blockwise(d_out: int, d_in: int, *, block: int = 64) -> Case:
    packed, scales = quantise.quantise(drawn(d_out, d_in), quantise.NF4_LEVELS, block=block)
    return quantise.multiply, (packed, scales, quantise.NF4_LEVELS), {"d_in": d_in, "block": block}


def sketched(d_out: int, d_in: int, *, groups: int) -> Case:
    return sketch.multiply, (drawn(d_out, groups, 16), codes_of(d_out, d_in // 2)), {}


def additive(d_out: int, d_in: int, *, group: int, books: int, bits: int) -> Case:
    count = -(-d_out * d_in // group * books * bits // 8)
    parts = codes_of(count), drawn(books, 2**bits, group).half(), drawn(d_out).half()
    return codebook.multiply, parts, {"d_in": d_in, "bits": bits}


CASES = {
    "odd rows in short blocks": blockwise(5, 21, block=8),
    "one block": blockwise(3, 10),
    "several tiles each way": blockwise(70, 66, block=16),
    "a sketch": sketched(5, 24, groups=3),
    "a sketch of several tiles": sketched(70, 68, groups=1),
    "codebooks of bytes": additive(5, 24, group=8, books=2, bits=8),
    "codebooks of nibbles": additive(3, 21, group=7, books=3, bits=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_its_reference(transposed: bool, case: str, dtype: torch.dtype) -> None:
    reference, parts, settings = CASES[case]
    d_out = len(parts[2]) if reference is codebook.multiply else len(parts[0])
    d_in = settings.get("d_in", 2 * parts[1].shape[-1])
    x = drawn(d_out if transposed else d_in, 6, seed=3).to(dtype).T.view(2, 3, -1)  # of strides of its own
    bias = None if transposed else drawn(d_out, seed=4)
    actual, expected = (
        run(x, bias, *parts, **settings, transposed=transposed)
        for run in (twin(reference.__wrapped__), reference.__wrapped__)
    )
    close = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 32 * torch.finfo(dtype).eps}
    torch.testing.assert_close(actual, expected, **close)


def test_no_rows_are_multiplied_to_none() -> None:
    reference, parts, settings = CASES["one block"]
    assert twin(reference.__wrapped__)(torch.empty(2, 0, 10), None, *parts, **settings).shape == (2, 0, 3)
