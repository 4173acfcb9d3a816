"""Published adapters for people: what the SDK and the command line make of them, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite import client
from offsite.emulator.methods import make, own_format
from offsite.protos.errors import ConflictError, InputError


@pytest.fixture
def published(tmp_path: Path, tiny: Any) -> tuple[Path, Path]:
    """The folders of two adapters that have learned something."""
    method, draw = make("lt-sft", {"share": 0.02}), torch.Generator().manual_seed(0)
    for seed, name in enumerate(("language", "task")):
        adapter = {
            key: torch.randn(tensor.shape, generator=draw) if key.endswith(".change") else tensor
            for key, tensor in method.start(tiny(), {4: 4}, seed=seed).items()
        }
        own_format.write(tmp_path / name, method, adapter, base_name="tiny")
    return tmp_path / "language", tmp_path / "task"


def tensors(folder: Path) -> bytes:
    return (folder / own_format.TENSORS).read_bytes()


def test_adapters_are_added_and_taken_off_again(published: tuple[Path, Path], tmp_path: Path) -> None:
    language, task = published
    both = client.compose(tmp_path / "both", [language, str(task)])
    assert tensors(both) == tensors(client.compose(tmp_path / "turned", [task, language]))
    assert tensors(client.compose(tmp_path / "left", [language, task], without=[task])) == tensors(language)
    with pytest.raises(ConflictError, match="both: not empty; .* name a new one"):
        client.compose(both, [language])
    with pytest.raises(InputError, match="nothing: expected a published adapter"):
        client.compose(tmp_path / "none", [language, tmp_path / "nothing"])
    assert not (tmp_path / "none").exists()


def test_the_command_line_adds_and_takes_off(published: tuple[Path, Path], tmp_path: Path, offsite: Any) -> None:
    language, task = map(str, published)
    left = tmp_path / "left"
    told = offsite("run", "compose", str(left), language, task, "--without", task)
    assert (told.returncode, told.stdout, told.stderr) == (0, f"{left}\n", "")
    assert tensors(left) == tensors(published[0])
    told = offsite("run", "compose", str(tmp_path / "none"), language, "--without", language)
    assert (told.returncode, told.stderr) == (3, "offsite: the adapters take each other off, and no change is left\n")
