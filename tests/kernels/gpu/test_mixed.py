"""Triton's LoRA of several adapters, beside its reference."""

import pytest
import torch
from torch import Tensor

from offsite.kernels import mixed
from offsite.kernels.device import twin

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytestmark = pytest.mark.slow(alone=True)  # as the interpreter is; CI runs them

CASES = {  # the adapter of each row, and where each adapter's factors start
    "one row of each": ([0, 1, 2], (0, 3, 4, 8)),
    "some of none, and one that nothing names": ([3, -1, 0, 0, 3, -1, 2], (0, 2, 6, 7, 12)),
    "several tiles each way": ([0, 1] * 20 + [1] * 30, (0, 70, 75)),
    "no row": ([], (0, 2, 5)),
    "nothing named": ([-1, -1], (0, 2, 5)),
    "an adapter of no rank": ([0, 1, 0], (0, 0, 5)),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["shrink", "expand", "outer"])
def test_a_kernel_is_its_reference(kernel: str, case: str, dtype: torch.dtype) -> None:
    names, starts = CASES[case]
    which, most, d = (
        torch.tensor(names, dtype=torch.int64),
        max(starts[i + 1] - s for i, s in enumerate(starts[:-1])),
        40,
    )
    wide = drawn(d, len(names), seed=0).to(dtype).T  # of strides of its own
    narrow, factors = drawn(len(names), most, seed=1), drawn(starts[-1], d, seed=2)
    reference = getattr(mixed, kernel).__wrapped__
    arguments = {"shrink": (wide, factors), "expand": (narrow.to(dtype), factors), "outer": (narrow, wide)}[kernel]
    actual, expected = (run(*arguments, which, starts) for run in (twin(reference), reference))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
