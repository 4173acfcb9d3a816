"""Adapters as files of ours: what is written is read back, and what is none is refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.emulator.methods import make, own_format
from offsite.emulator.plug import load

PLACES = {0: 0, 4: 4}


def written(folder: Path, tiny: Any) -> Path:
    method = make("paca", {"rank": 3, "modules": ["q_proj"]})
    adapter = method.start(tiny(), PLACES, seed=0)
    adapter = {key: tensor + (tensor.dtype == torch.float32) for key, tensor in adapter.items()}
    own_format.write(folder, method, adapter, base_name="tiny")
    return folder


def test_a_method_with_its_settings_and_its_tensors_is_read_back(tmp_path: Path, tiny: Any, ids: torch.Tensor) -> None:
    method, adapter = own_format.read(written(tmp_path, tiny))
    assert method == make("paca", {"rank": 3, "modules": ["q_proj"]}) and adapter["0.self_attn.q_proj.change"].all()
    with torch.no_grad():
        expected = method.attach(tiny(), PLACES, adapter)(ids).logits
        assert torch.equal(load(tiny(), tmp_path)(ids).logits, expected)
    assert "load(base" in (tmp_path / "README.md").read_text() and "tiny" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "expected a published adapter, offsite_adapter.json with a method"),
        ("[]", "expected a published adapter"),
        ({"method": "paca"}, "KeyError: 'settings'"),
        ({"method": "pacca", "settings": {}}, "there is no method 'pacca' .did you mean paca"),
        ({"method": "lora", "settings": {}}, "adapter key '0.self_attn.q_proj.change': expected"),
    ],
)
def test_a_folder_with_no_such_adapter_is_refused(tmp_path: Path, tiny: Any, document: Any, words: str) -> None:
    written(tmp_path, tiny)
    (tmp_path / own_format.DOCUMENT).write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=words):
        load(tiny(), tmp_path)


def test_tensors_that_are_missing_or_no_tensors_are_refused(tmp_path: Path, tiny: Any) -> None:
    written(tmp_path, tiny)
    (tmp_path / own_format.TENSORS).write_bytes(b"none")
    with pytest.raises(ValueError, match="SafetensorError"):
        load(tiny(), tmp_path)
    (tmp_path / own_format.TENSORS).unlink()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        load(tiny(), tmp_path)
    with pytest.raises(ValueError, match="has no adapter: neither peft's adapter_config.json nor offsite_adapter.json"):
        load(tiny(), tmp_path / "nowhere")
