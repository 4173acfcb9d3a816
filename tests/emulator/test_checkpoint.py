"""A base that is read layer by layer gives the same emulator as one in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.emulator import bundle, placements, zoo
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import find
from offsite.emulator.builders import make
from offsite.emulator.checkpoint import Checkpoint
from offsite.emulator.modality import Batch
from offsite.emulator.precision import DTYPES


@pytest.fixture(params=[pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def stored(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of the base on disk."""
    return DTYPES[request.param]


@torch.no_grad()
def test_a_base_read_layer_by_layer_gives_the_emulator_that_one_in_memory_gives(
    family: str, stored: torch.dtype, tiny: Any, tokenizer: Any, text: list[Batch], ids: torch.Tensor, tmp_path: Path
) -> None:
    tiny(family).to(stored).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = zoo.load_base(tmp_path / "base", dtype="auto")
    model.float()  # in which layers are chosen
    source = Checkpoint.open(tmp_path / "base")
    streamed, found = source.stream()
    assert found == stored
    path = find(streamed).path
    torch.testing.assert_close(streamed(ids).logits, model(ids).logits, rtol=0, atol=0)
    held = {name: tensor.is_meta for name, tensor in streamed.named_parameters()}
    assert all(is_meta == name.startswith(f"{path}.") for name, is_meta in held.items())
    original = {name: tensor for file in {*source.files.values()} for name, tensor in load_file(file).items()}
    for sharing in ("on", "auto") if family == "llama" else ("off",):
        builder: Any = make("crash", {"keep": 4, "sharing": sharing})
        outline = builder.outline(streamed, text, placements.Ends(1, 1))
        assert outline == builder.outline(model, text, placements.Ends(1, 1))
        stack = restack(model, outline.layers, outline.shared)
        whole, parts = tmp_path / sharing, tmp_path / f"{sharing}-streamed"
        bundle.save(stack, tokenizer, whole, outline=outline, dtype=stored)
        bundle.copy(source, streamed, tokenizer, parts, outline=outline, dtype=stored)
        written = [{file.name: file.read_bytes() for file in folder.glob("*.[sj]*")} for folder in (whole, parts)]
        assert written[0].keys() == written[1].keys()
        assert all(written[0][name] == written[1][name] for name in written[0] if name != "config.json")
        told = [json.loads(files["config.json"]) for files in written]
        assert [one["dtype"] for one in told] == [str(stored).removeprefix("torch.")] * 2
        for file in whole.glob("model-*.safetensors"):
            for tensor in load_file(file).values():
                assert any(tensor.dtype == one.dtype and torch.equal(tensor, one) for one in original.values())


def test_files_that_name_their_tensors_otherwise_are_refused(tiny: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.replace("layers", "old"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"no model\.layers\.0\.input_layernorm\.weight and 53 more, but model\.old"):
        Checkpoint.open(tmp_path).stream()
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Checkpoint.open(tmp_path)
