"""Whole passes, forward and back, as they run where tensors are on a GPU: outputs and gradients are the references'."""

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator.formats import make
from offsite.emulator.formats.packed import dense, packed
from offsite.kernels import device, mixed, partial, sparse

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytestmark = pytest.mark.slow(alone=True)  # as the interpreter is; CI runs them

AT = torch.tensor([5, 0, 3])
Pass = Callable[..., Tensor]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def several(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return mixed.add(y, x, torch.tensor([[0, 1, 1], [-1, 1, 0]]), mixed.Adapters(down, up, (0, 3, 4)))


def in_few_bits(x: Tensor) -> Tensor:
    linear = nn.Linear(7, 6)
    with torch.no_grad():
        linear.weight.copy_(drawn(6, 7, seed=8))
        linear.bias.copy_(drawn(6, seed=9))
    format = make("nf4", {"block": 4})
    return packed(linear, format, format.encode(dense(linear)))(x)


PASSES: dict[str, tuple[Pass, list[tuple[int, ...]], int]] = {  # and the shapes of its inputs, and how many kernels run
    "columns": (lambda y, x, D: partial.add_columns(y, x, AT, D), [(2, 3, 6), (2, 3, 7), (6, 3)], 1),
    "rows": (lambda y, x, D: partial.add_rows(y, x, AT, D), [(2, 3, 6), (2, 3, 7), (3, 7)], 1),
    "entries": (lambda x, values: sparse.product(x, AT.sort().values, values, (6, 7)), [(2, 3, 7), (3,)], 3),
    "several adapters": (several, [(2, 3, 6), (2, 3, 7), (4, 7), (4, 6)], 6),
    "few bits": (in_few_bits, [(2, 3, 7)], 2),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_on_a_gpu_is_that_of_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, shapes, kernels = PASSES[name]
    inputs = [drawn(*shape, seed=at).requires_grad_() for at, shape in enumerate(shapes)]

    def both() -> tuple[Tensor, ...]:
        output = run(*inputs)
        return output, *torch.autograd.grad(output, inputs, drawn(*output.shape, seed=7))

    expected, calls, original = both(), count(), device.twin
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(device, "twin", lambda reference: (next(calls), original(reference))[1])
    actual = both()
    monkeypatch.undo()
    assert next(calls) == kernels
    torch.testing.assert_close(actual, expected)
