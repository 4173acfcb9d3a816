import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.emulator import bundle
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, text_config
from offsite.emulator.bundle import Layout
from offsite.emulator.outline import Outline

REMOVED = Outline((0, 2, 3, 5), (0, 5))
SHARED = Outline((0, 1, 2, 3, 4, 5), (0, 5), {1: 2, 4: 5})


def saved(model: Any, tokenizer: Any, folder: Path, outline: Outline) -> Any:
    """Save the emulator of an outline, and return it."""
    emulator = restack(model, outline.layers, outline.shared)
    bundle.save(emulator, tokenizer, folder, outline=outline)
    return emulator


@pytest.mark.parametrize("outline", [REMOVED, SHARED])
@torch.no_grad()
def test_what_is_loaded_is_what_was_saved(
    family: str, tiny: Any, tokenizer: Any, ids: torch.Tensor, tmp_path: Path, outline: Outline
) -> None:
    emulator = saved(tiny(family), tokenizer, tmp_path, outline)
    loaded, _ = bundle.load(tmp_path, layout=Layout(outline), dtype=torch.float32)
    assert torch.equal(loaded.eval()(ids).logits, emulator(ids).logits)
    assert len(layers(loaded)) == text_config(loaded).num_hidden_layers == len(outline.layers)


def test_the_tokenizer_comes_with_the_model(tiny: Any, chat: Any, tmp_path: Path) -> None:
    saved(tiny(), chat, tmp_path, REMOVED)
    _, loaded = bundle.load(tmp_path, layout=Layout(REMOVED), dtype="auto")
    assert loaded("w5 w6").input_ids == chat("w5 w6").input_ids == [1, 5, 6]
    assert loaded.chat_template == chat.chat_template


@pytest.mark.parametrize("outline", [REMOVED, SHARED])
def test_a_bundle_holds_each_kept_layer_once_and_no_tensor_of_a_dropped_one(
    family: str, tiny: Any, tokenizer: Any, tmp_path: Path, outline: Outline
) -> None:
    model = tiny(family)
    saved(model, tokenizer, tmp_path, outline)
    stored = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    kept = {layer for place, layer in enumerate(outline.layers) if place not in outline.shared}
    # The tensors of a random model all differ, so equal bytes are a tensor that was given away.
    given = [tensor.numpy().tobytes() for tensor in stored.values()]
    assert len(given) == len(set(given))
    for number, layer in enumerate(layers(model)):
        assert {tensor.detach().numpy().tobytes() in given for tensor in layer.parameters()} == {number in kept}


def test_the_files_are_a_model_folder_without_code(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    saved(tiny(), tokenizer, tmp_path, REMOVED)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_the_type_of_the_weights_is_chosen_at_loading(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    saved(tiny().to(torch.bfloat16), tokenizer, tmp_path, SHARED)
    for asked, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        loaded, _ = bundle.load(tmp_path, layout=Layout(SHARED), dtype=asked)
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}


def test_a_folder_that_names_code_is_refused(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    saved(tiny(), tokenizer, tmp_path, REMOVED)
    for name, entry in (
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        ("config.json", {"text_config": {"attn_implementation": "someone/kernel"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ):
        path = tmp_path / name
        honest = path.read_text()
        path.write_text(json.dumps(json.loads(honest) | entry))
        with pytest.raises(ValueError, match=rf"{name}: '\w+' names code to load"):
            bundle.load(tmp_path, layout=Layout(REMOVED), dtype="auto")
        path.write_text(honest)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names another model to load"):
        bundle.load(tmp_path, layout=Layout(REMOVED), dtype="auto")


def test_weights_that_are_not_the_models_are_refused(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    saved(tiny(), tokenizer, tmp_path, REMOVED)
    path = tmp_path / "config.json"
    honest = json.loads(path.read_text())
    for other in ({"num_hidden_layers": 5}, {"intermediate_size": 40}):
        path.write_text(json.dumps(honest | other))
        with pytest.raises(ValueError, match="the weights do not fill the model"):
            bundle.load(tmp_path, layout=Layout(REMOVED), dtype="auto")
    next(tmp_path.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a safetensors file: "):
        bundle.load(tmp_path, layout=Layout(REMOVED), dtype="auto")
    path.unlink()
    with pytest.raises(ValueError, match="not a model folder: config.json is missing"):
        bundle.load(tmp_path, layout=Layout(REMOVED), dtype="auto")
