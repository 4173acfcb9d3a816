"""What Triton kernels have in common: the sizes of their tiles, and the precision of their products."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 32, 64, 32  # of a tile of an output, and of what is multiplied at a time


def precision() -> str:
    """Return how products of fp32 are made: as torch makes them, in full unless the process asked for TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def flat(tensor: Tensor) -> Tensor:
    """Return a tensor (..., n) as contiguous rows (m, n)."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def grid(rows: int, columns: int) -> tuple[int, int]:
    """Return how many tiles an output (rows, columns) has each way."""
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)


def operand(dtype: torch.dtype) -> Any:
    """Return the dtype in which a product takes factors that are of this one.

    It is the same, but under Triton's interpreter, which cannot multiply bf16: fp32 holds such factors exactly.
    """
    if triton.knobs.runtime.interpret or dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@triton.jit
def add(before, more):
    """Return the sum of two tiles in the dtype of the first, to which the second is rounded first."""
    return (before.to(tl.float32) + more.to(before.dtype).to(tl.float32)).to(before.dtype)
