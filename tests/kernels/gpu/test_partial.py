"""Triton's products with some columns or rows, beside their references."""

import pytest
import torch
from torch import Tensor

from offsite.kernels import partial
from offsite.kernels.device import twin

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytestmark = pytest.mark.slow(alone=True)  # as the interpreter is; CI runs them

SIZES = {  # rows of x, d_in, d_out, r
    "one tile": (3, 20, 9, 4),
    "several tiles each way": (35, 40, 70, 33),
    "nothing to multiply": (3, 5, 6, 0),
    "no rows": (0, 5, 6, 2),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_a_kernel_is_its_reference(side: str, size: str, dtype: torch.dtype) -> None:
    count, d_in, d_out, rank = SIZES[size]
    y, x = drawn(count, d_out, seed=0).to(dtype), drawn(d_in, count, seed=1).to(dtype).T  # of strides of its own
    along, across = (d_in, d_out) if side == "columns" else (d_out, d_in)
    index = torch.randperm(along, generator=torch.Generator().manual_seed(2))[:rank]
    change = drawn(across, rank, seed=3) if side == "columns" else drawn(rank, across, seed=3)
    reference = partial.gather_multiply if side == "columns" else partial.multiply_scatter
    before = y.clone()
    close = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 32 * torch.finfo(dtype).eps * 0.5}
    actual, expected = (run(y, x, index, change) for run in (twin(reference.__wrapped__), reference.__wrapped__))
    torch.testing.assert_close(actual, expected, **close)
    assert torch.equal(y, before)


def test_leading_dimensions_stay_and_a_change_of_few_bits_is_multiplied_as_it_is() -> None:
    y, x, index = drawn(2, 3, 6, seed=0), drawn(2, 3, 5, seed=1), torch.tensor([4, 0])
    change = drawn(6, 2, seed=2).bfloat16()
    actual, part = twin(partial.gather_multiply.__wrapped__)(y, x, index, change)
    assert torch.equal(part, x[..., index])
    expected, _ = partial.gather_multiply.__wrapped__(y, x, index, change)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
