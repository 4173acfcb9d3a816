"""A base that is read layer by layer gives the same emulator as one in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.emulator import bundle, placements
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import find
from offsite.emulator.batches import Batch
from offsite.emulator.builders import make
from offsite.emulator.zoo.checkpoint import Checkpoint


@pytest.fixture
def folder(family: str, tiny: Any, tokenizer: Any, tmp_path: Path) -> Path:
    tiny(family).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def test_a_base_read_layer_by_layer_gives_the_emulator_that_one_in_memory_gives(
    family: str, tiny: Any, folder: Path, tokenizer: Any, text: list[Batch], ids: torch.Tensor, tmp_path: Path
) -> None:
    model, source = tiny(family), Checkpoint.open(folder)
    streamed = source.stream()
    path = find(streamed).path
    torch.testing.assert_close(streamed(ids).logits, model(ids).logits, rtol=0, atol=0)
    held = {name: tensor.is_meta for name, tensor in streamed.named_parameters()}
    assert all(is_meta == name.startswith(f"{path}.") for name, is_meta in held.items())
    for sharing in ("off", "on") if family == "llama" else ("off",):
        builder: Any = make("crash", {"keep": 4, "sharing": sharing})
        outline = builder.outline(streamed, text, placements.Ends(1, 1))
        assert outline == builder.outline(model, text, placements.Ends(1, 1))
        bundle.save(restack(model, outline.layers, outline.shared), tokenizer, tmp_path / sharing, outline=outline)
        bundle.copy(source, streamed, tokenizer, tmp_path / f"{sharing}-streamed", outline=outline)
        written = [
            {path.name: path.read_bytes() for path in sorted(tmp_path.glob(f"{sharing}{end}/model*"))}
            for end in ("", "-streamed")
        ]
        assert written[0] and written[0] == written[1]


def test_files_that_name_their_tensors_otherwise_are_refused(tiny: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.replace("layers", "old"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.0\.self_attn"):
        Checkpoint.open(tmp_path).stream()
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Checkpoint.open(tmp_path)
