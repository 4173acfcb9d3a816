"""LoRA of several adapters in one batch, against each by itself."""

import pytest
import torch
from torch import Tensor

from offsite.kernels.mixed import Adapters, add, stack

RANKS, SCALES = (3, 1, 4), (2.0, 0.5, 1.0)
WHICH = torch.tensor([2, 0, -1, 1, 0, 2, 2])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(drawn(rank, 6, seed=at), drawn(5, rank, seed=at + 9)) for at, rank in enumerate(RANKS)]


def test_each_row_gets_what_its_adapter_alone_would_give_it() -> None:
    whole = [(down.mul(4).round(), up.mul(4).round()) for down, up in pairs()]  # no sum of these is rounded
    y, x = drawn(7, 5, seed=1).round(), drawn(7, 6, seed=2).mul(4).round()
    result = add(y, x, WHICH, stack(whole, SCALES))
    for row, (at, before, outcome) in enumerate(zip(WHICH.tolist(), y, result, strict=True)):
        down, up = whole[at]
        assert torch.equal(outcome, before if at < 0 else before + SCALES[at] * (up @ (down @ x[row])))


def test_the_rows_of_an_adapter_get_the_bits_that_they_get_without_the_others() -> None:
    y, x, adapters = drawn(7, 5).float(), drawn(7, 6).float(), stack(pairs(), SCALES)
    together = add(y, x, WHICH, adapters)
    for at in range(3):
        mine = WHICH == at
        alone = stack([pairs()[at]], [SCALES[at]])
        assert torch.equal(together[mine], add(y[mine], x[mine], WHICH[mine] - at, alone))


def test_the_gradients_are_right() -> None:
    adapters, y, x = stack(pairs(), SCALES), drawn(7, 5, seed=1), drawn(7, 6, seed=2)

    def run(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return add(y, x, WHICH, Adapters(down, up, adapters.starts))

    inputs = [tensor.detach().requires_grad_() for tensor in (y, x, adapters.down, adapters.up)]
    assert torch.autograd.gradcheck(run, inputs)


def test_an_adapter_that_nothing_names_has_no_gradient_and_none_is_kept_where_none_trains() -> None:
    adapters, x = stack(pairs(), SCALES), drawn(2, 6).requires_grad_()
    down = adapters.down.requires_grad_()
    add(drawn(2, 5), x, torch.tensor([0, 0]), adapters).sum().backward()
    assert down.grad is not None and down.grad[:3].all() and not down.grad[3:].any()
    kept = list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: x):
        add(drawn(2, 5), x, torch.tensor([0, 0]), stack(pairs(), SCALES))
    assert x.data_ptr() not in kept and len(kept) == 3


def test_a_sequence_names_one_adapter_for_all_its_rows() -> None:
    adapters, y, x = stack(pairs(), SCALES), drawn(2, 3, 5), drawn(2, 3, 6)
    of_rows = add(y, x, torch.tensor([[1, 1, 1], [2, 2, 2]]), adapters)
    assert torch.equal(add(y, x, torch.tensor([1, 2]), adapters), of_rows)
    with pytest.raises(ValueError, match=r"which \(3,\) names no adapter for each row of x \(2, 3, 6\)"):
        add(y, x, torch.tensor([1, 2, 0]), adapters)
    with pytest.raises(ValueError, match=r"which \(2, 3, 6\)"):
        add(y, x, torch.zeros(2, 3, 6, dtype=torch.int64), adapters)


def test_half_precision_goes_in_and_comes_out() -> None:
    adapters = stack([(down.float(), up.float()) for down, up in pairs()], SCALES)
    y, x = drawn(7, 5).bfloat16(), drawn(7, 6).bfloat16().requires_grad_()
    output = add(y, x, WHICH, adapters)
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
