"""Natural GaLore: its algebra, what it keeps, what it is without a history, and how well it trains beside that."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator import optimisers
from offsite.emulator.optimisers.natural_galore import natural
from offsite.emulator.seeds import generator


def made(
    *parameters: nn.Parameter, lr: float = 0.1, weight_decay: float = 0.0, **settings: Any
) -> torch.optim.Optimizer:
    return optimisers.make("natural-galore", settings).make(
        parameters, learning_rate=lr, weight_decay=weight_decay, seed=0, first_step=0
    )


def drawn(*shape: int, number: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(number, "gradient"))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_woodbury_is_the_dense_inverse(dtype: torch.dtype, near: float) -> None:
    history, gradient = drawn(300, 20).to(dtype), drawn(300, number=1).to(dtype)
    history[:, -3:] = 0  # as before so many gradients were seen
    dense = history.double() @ history.double().T + 0.3 * torch.eye(300).double()
    expected = torch.linalg.solve(dense, gradient.double())
    assert float((natural(gradient, history, 0.3) - expected).norm() / expected.norm()) < near


@pytest.mark.parametrize(
    ("settings", "kept", "most"),
    [
        ({}, 64 * (1536 + 576) + 22 * 64 * 64, 0.13),
        ({"rank": 128}, 128 * (1536 + 576) + 22 * 128 * 128, 0.36),
        ({"history": 0}, 64 * 576 + 2 * 64 * 1536, 0.14),
        ({"sides": "one"}, 64 * 576 + 22 * 64 * 1536, 1.25),  # more than Adam: the history is the larger part
    ],
)
def test_what_is_kept_of_a_matrix_beside_what_adam_keeps(settings: dict[str, Any], kept: int, most: float) -> None:
    matrix = nn.Parameter(torch.zeros(1536, 576))
    matrix.grad = drawn(1536, 576)
    optimizer = made(matrix, **{"rank": 64} | settings)
    optimizer.step()
    assert sum(tensor.numel() for tensor in optimizer.state[matrix].values()) == kept + 1  # and the step
    assert kept <= most * 2 * matrix.numel() and bool(matrix.any())


def test_vectors_and_matrices_of_which_less_is_kept_so_train_by_torchs_adamw() -> None:
    values = [drawn(7), drawn(3, 4, 5, number=1), drawn(5, 5, number=2)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    one = made(*ours, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad, b.grad = (drawn(*a.shape, number=step) for _ in range(2))
        one.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_without_a_history_it_is_galore() -> None:
    """Zhao et al., algorithm 1: P of r left singular vectors, Adam on P^T G, and W <- W - lr scale P N."""
    matrix, expected = nn.Parameter(torch.zeros(8, 30)), torch.zeros(8, 30)
    optimizer = made(matrix, history=0, rank=2, every=2, scale=0.5)
    first, second = torch.zeros(2, 30), torch.zeros(2, 30)
    for step in range(4):
        gradient = drawn(8, 30, number=step)
        if step % 2 == 0:
            project = torch.linalg.svd(gradient, full_matrices=False)[0][:, :2]
        low = project.T @ gradient
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low.square()
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        expected -= 0.1 * 0.5 * project @ (unbiased[0] / (unbiased[1].sqrt() + 1e-8))
        matrix.grad = gradient
        optimizer.step()
    torch.testing.assert_close(matrix.detach(), expected)


def test_the_rounding_of_a_gradient_turns_no_first_step() -> None:
    """Beside the diagonal of U^T G V is nothing but rounding, and Adam would make as much of it as of the rest."""
    moves = []
    for rounding in (0.0, 1e-6):
        matrix = nn.Parameter(torch.zeros(64, 30))
        matrix.grad = 1e3 * (drawn(64, 30) + rounding * drawn(64, 30, number=1))
        made(matrix).step()
        moves.append(matrix.detach())
    assert float((moves[0] - moves[1]).norm()) < 1e-3 * float(moves[0].norm())


def test_a_matrix_without_a_gradient_waits_for_its_subspace() -> None:
    """As LoRA's A does in the first step, in which B is zero."""
    matrix, only = nn.Parameter(torch.ones(8, 30)), nn.Parameter(torch.ones(8, 30))
    late, early = made(matrix, rank=2), made(only, rank=2)
    matrix.grad = torch.zeros(8, 30)
    late.step()
    assert torch.equal(matrix, torch.ones(8, 30))
    matrix.grad, only.grad = drawn(8, 30), drawn(8, 30)
    late.step()
    early.step()
    assert torch.equal(matrix, only) and not torch.equal(only, torch.ones(8, 30))


def trained(**settings: Any) -> float:
    """Train a net of two layers on the next word of a chain of 40; return its loss in expectation, in nats."""
    draw = generator(0, "text")
    chain = torch.softmax(3 * torch.randn(40, 40, generator=draw), dim=-1)
    shapes = {(40, 32): 0.3, (64, 32): 0.18, (40, 64): 0.125}
    embed, inner, head = (nn.Parameter(scale * torch.randn(shape, generator=draw)) for shape, scale in shapes.items())
    optimizer = made(embed, inner, head, **{"rank": 8, "every": 50} | settings)
    for _ in range(120):
        words = torch.randint(40, (32,), generator=draw)
        following = torch.multinomial(chain[words], 1, generator=draw)[:, 0]
        loss = functional.cross_entropy(torch.relu(embed[words] @ inner.T) @ head.T, following)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(functional.cross_entropy(torch.relu(embed @ inner.T) @ head.T, chain))


def test_with_relative_damping_it_trains_as_well_as_galore() -> None:
    galore = trained(history=0)
    assert trained(sides="one") <= 1.05 * galore
    assert galore < 2.6 < 3.6 < trained(lr=1e-9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank and every must be at least 1"),
        ({"history": -1}, "history in 0..1000"),
        ({"damping": 0.0}, "damping above 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"sides": "two"}, "sides: .*'least' or 'one'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimisers.make("natural-galore", settings)


def test_galore_is_named_by_its_settings() -> None:
    with pytest.raises(ValueError, match=r"no optimiser 'galore': it is .*natural-galore\(history=0\)"):
        optimisers.make("galore", {})
