"""How far an update went, summed up as it comes: what reading it afterwards gives, or nothing."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offsite.kernels.schema import Tensors
from offsite.protos import tensors
from offsite.protos.upload.change import Change

Add = Callable[[Tensors], Tensors]


def start() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(40_001, generator=generator),
        "a": torch.randn(3, 7, generator=generator).double(),
        "c": torch.randn(50_000, generator=generator).bfloat16(),
        "d": torch.zeros(1),
        "e": torch.randn(9, generator=generator).half(),
    }


def files(folder: Path, change: Add) -> tuple[Path, Path]:
    save_file(start(), folder / "start", metadata={"longer": "x" * 99})
    save_file(change(start()), folder / "update")
    return folder / "start", folder / "update"


def seen(broadcast: Path, update: Path, *, size: int) -> float | None:
    change, data = Change(broadcast), update.read_bytes()
    for at in range(0, len(data), size):
        change.add(memoryview(data)[at : at + size])
    change.close()
    return change.norm(update)


def moved(adapter: Tensors) -> Tensors:
    return {name: tensor * 1.5 + 0.25 for name, tensor in adapter.items()}


@pytest.mark.parametrize("size", [4096, 1 << 16, 1 << 20])
def test_it_is_what_reading_both_files_gives(tmp_path: Path, size: int) -> None:
    broadcast, update = files(tmp_path, moved)
    assert seen(broadcast, update, size=size) == pytest.approx(tensors.distance(update, broadcast), rel=1e-7)
    assert seen(broadcast, broadcast, size=size) == 0.0


def test_a_value_that_is_not_finite_shows(tmp_path: Path) -> None:
    broadcast, update = files(tmp_path, lambda adapter: adapter | {"d": torch.tensor([math.nan])})
    assert math.isnan(seen(broadcast, update, size=1 << 16) or 0.0)


@pytest.mark.parametrize(
    ("change", "size"),
    [
        (lambda adapter: adapter | {"d": torch.zeros(2)}, 4096),  # another shape
        (lambda adapter: {**adapter, "b": adapter["d"], "d": adapter["b"]}, 4096),  # another order of the same sizes
        (lambda adapter: {("x" if name == "d" else name): tensor for name, tensor in adapter.items()}, 4096),
        (lambda adapter: {name: adapter[name] for name in "abce"}, 4096),
        (lambda adapter: adapter | {"x": torch.zeros(1)}, 4096),
        (lambda adapter: adapter | {"b": adapter["b"].view(torch.int32)}, 4096),
        (moved, 4097),  # pieces that split values
        (moved, 64),  # nor is the header whole in the first
    ],
)
def test_what_is_laid_out_otherwise_is_left_to_be_read(tmp_path: Path, change: Add, size: int) -> None:
    assert seen(*files(tmp_path, change), size=size) is None


def test_what_has_not_come_whole_and_what_are_no_floats_are_left_to_be_read(tmp_path: Path) -> None:
    broadcast, update = files(tmp_path, moved)
    half = Change(broadcast)
    half.add(update.read_bytes()[:-4])
    half.close()
    assert half.norm(update) is None
    broadcast, update = files(tmp_path, moved)
    save_file({"i": torch.arange(3)}, broadcast)
    assert seen(broadcast, broadcast, size=4096) is None
