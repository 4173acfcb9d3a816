"""Some columns or rows of maps: the gradients of what they add, and what is kept for these."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offsite.kernels.partial import add_columns, add_rows

INDEX = torch.tensor([5, 0, 3])
SIDES = {"columns": (add_columns, (4, 3)), "rows": (add_rows, (3, 7))}  # of a map (d_out, d_in) = (4 or 6, 7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("side", SIDES)
def test_the_output_is_that_of_a_matrix_whose_other_entries_are_zero(side: str) -> None:
    add, size = SIDES[side]
    change, x = drawn(*size, seed=1), drawn(2, 5, 7, seed=2)
    y = drawn(2, 5, 4 if side == "columns" else 6, seed=3)
    matrix = torch.zeros(y.shape[-1], 7, dtype=torch.float64).index_copy(int(side == "columns"), INDEX, change)
    torch.testing.assert_close(add(y, x, INDEX, change), y + functional.linear(x, matrix))


@pytest.mark.parametrize("side", SIDES)
def test_the_gradients_are_right(side: str) -> None:
    add, size = SIDES[side]
    inputs = [drawn(2, 3, 4 if side == "columns" else 6), drawn(2, 3, 7, seed=1), drawn(*size, seed=2)]
    y, x, change = (tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(lambda y, x, change: add(y, x, INDEX, change), (y, x, change))


@pytest.mark.parametrize("side", SIDES)
def test_an_input_that_needs_no_gradient_gets_none_and_a_change_that_does_not_train_keeps_no_input(side: str) -> None:
    add, size = SIDES[side]
    y, x = drawn(3, 4 if side == "columns" else 6).requires_grad_(), drawn(3, 7)
    kept = list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: x):
        add(y, x, INDEX, drawn(*size))
    assert len(kept) == 2 and x.data_ptr() not in kept  # the index and the change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_input_only_its_columns_are_kept_and_in_its_own_dtype(dtype: torch.dtype) -> None:
    x, change = torch.randn(50, 40).to(dtype).requires_grad_(), torch.zeros(30, 3, requires_grad=True)
    kept = list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = add_columns(torch.zeros(50, 30, dtype=dtype), x, INDEX, change)
    of_input = [tensor for tensor in kept if tensor.dtype == dtype and len(tensor) == 50]
    assert [tuple(tensor.shape) for tensor in of_input] == [(50, 3)] and torch.equal(of_input[0], x[:, INDEX])
    assert sum(tensor.numel() for tensor in kept) == 50 * 3 + 3 + 30 * 3
    output.sum().backward()
    assert output.dtype == dtype and change.grad is not None and change.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == dtype
