"""Which of a kernel's two implementations runs."""

import ast
from pathlib import Path

import pytest
import torch

from offsite.kernels import device

KERNELS = Path(__file__).parents[2] / "kernels"


@device.by_device
def described(x: torch.Tensor, *, word: str) -> str:
    """Say what ran."""
    return f"reference {word}"


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.fixture(autouse=True)
def gpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "twin", lambda reference: lambda x, *, word: f"twin of {reference.__name__} {word}")
    monkeypatch.setattr(device, "has_triton", lambda: True)


def test_on_the_cpu_the_reference_runs() -> None:
    assert described(torch.zeros(3), word="here") == "reference here"


def test_on_a_gpu_its_twin_runs_where_triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.zeros(3).as_subclass(Elsewhere)
    assert described(there, word="there") == "twin of described there"
    monkeypatch.setattr(device, "has_triton", lambda: False)
    assert described(there, word="there") == "reference there"


def test_doubles_stay_doubles() -> None:
    assert described(torch.zeros(3).double().as_subclass(Elsewhere), word="there") == "reference there"


def test_what_autocast_casts_is_the_reference() -> None:
    there = torch.zeros(3).as_subclass(Elsewhere)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert described(there, word="there") == "reference there"
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_every_reference_has_a_twin_with_the_same_arguments() -> None:
    def functions(path: Path) -> dict[str, ast.FunctionDef]:
        return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}

    kernels = [
        (path, node)
        for path in KERNELS.glob("*.py")
        for node in functions(path).values()
        if any(isinstance(mark, ast.Name) and mark.id == "by_device" for mark in node.decorator_list)
    ]
    assert kernels
    for path, node in kernels:
        twin = functions(KERNELS / "gpu" / path.name)[node.name]
        assert ast.unparse(twin.args) == ast.unparse(node.args), node.name
