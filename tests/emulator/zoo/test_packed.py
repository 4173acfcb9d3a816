"""Whole models as GGUF, and from it: what goes out comes in again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from offsite.client.adapters import export
from offsite.emulator import zoo
from offsite.emulator.exports.gguf_tokenizer import SPLIT
from offsite.emulator.zoo import packed
from offsite.protos.errors import InputError

TEXT = ["the cat sat on the mat in 1984, didn't it?", "a triage of 365 patients\n\nis hard", "naïve café €5"]
SIZES = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
KINDS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}
CHAT = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"


def words(cut: list[Any] | None = None) -> Any:
    """A tokenizer of byte-level BPE with a chat template, and two tokens of its own."""
    backend = Tokenizer(models.BPE())
    plain = [*(cut or []), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(plain) if cut else plain[0]
    backend.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", chat_template=CHAT
    )
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def store(folder: Path, tokenizer: Any, kind: str = "llama", dtype: Any = torch.float32, **settings: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, KINDS[kind])(**SIZES | {"sliding_window": None} | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(folder: Path) -> Any:
    model, tokenizer = zoo.load_base(folder, torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokenizer(TEXT[0]).input_ids])).logits


DIGITS = [pre_tokenizers.Split(Regex(SPLIT % "{1,3}"), behavior="isolated")]
CASES = [
    ("llama", None, {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    ("llama", DIGITS, {"tie_word_embeddings": False, "head_dim": 16}),
    pytest.param("mistral", DIGITS, {}, marks=pytest.mark.slow),
    ("qwen2", [pre_tokenizers.Split(Regex(SPLIT % ""), behavior="isolated")], {"rms_norm_eps": 1e-5}),
]


@pytest.mark.parametrize(("kind", "cut", "settings"), CASES)
def test_a_model_that_goes_out_as_gguf_comes_in_again(kind: str, cut: Any, settings: Any, tmp_path: Path) -> None:
    tokenizer = words(cut)
    folder = store(tmp_path / "model", tokenizer, kind, **settings)
    assert export(tmp_path / "out", folder, "gguf") == 0
    back = zoo.locate(str(tmp_path / "out"), cache=tmp_path / "cache")
    assert back == zoo.locate(str(tmp_path / "out" / "model.gguf"), cache=tmp_path / "cache"), "read once"
    torch.testing.assert_close(logits(back), logits(folder), atol=1e-4, rtol=1e-4)
    own = zoo.load_tokenizer(back)
    for text in (*TEXT, "<|start|>so <think>7777"):
        assert own(text).input_ids == tokenizer(text).input_ids
    turns = [{"role": "user", "content": "hi"}]
    assert own.apply_chat_template(turns, tokenize=False) == "user: hi\n"
    assert (own.bos_token, own.eos_token) == ("<|start|>", "<|end|>")


@pytest.mark.slow
def test_a_file_is_in_the_precision_of_its_model_and_read_in_that(tmp_path: Path) -> None:
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        folder = store(tmp_path / kind, words(), dtype=dtype)
        export(tmp_path / f"out-{kind}", folder, "gguf")
        (file,) = (tmp_path / f"out-{kind}").iterdir()
        kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
        back = zoo.locate(str(file), cache=tmp_path / "cache")
        model, _ = zoo.load_base(back, "auto")
        assert kinds == {kind} and model.dtype == dtype
        before = zoo.load_base(folder, "auto")[0].state_dict()
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items() if one.ndim > 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaled positions"),
        ({"attention_bias": True}, "biases of k_proj, o_proj, q_proj, v_proj"),
        ({"kind": "mistral", "sliding_window": 8}, "a window of attention"),
    ],
)
def test_what_would_be_lost_is_not_written(settings: Any, message: str, tmp_path: Path) -> None:
    folder = store(tmp_path / "model", words(), **settings)
    with pytest.raises(InputError, match=f"GGUF is not written of {message}.*convert_hf_to_gguf.py"):
        export(tmp_path / "out", folder, "gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    folder = store(tmp_path / "model", tokenizer)
    with pytest.raises(InputError, match="no byte-level BPE"):
        export(tmp_path / "out", folder, "gguf")
    folder = store(tmp_path / "other", words([pre_tokenizers.Split(" ", behavior="isolated")]))
    with pytest.raises(InputError, match="cuts texts in a way that is not known here"):
        export(tmp_path / "out", folder, "gguf")


def write(file: Path, architecture: str = "llama", *, tensors: Any = (), **fields: str) -> Path:
    writer = GGUFWriter(file, architecture)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    for name in tensors:
        writer.add_tensor(name, quantize(torch.ones(2, 2).numpy(), GGMLQuantizationType.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_what_is_no_model_in_gguf_is_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(path: Path) -> Path:
        return zoo.locate(str(path), cache=tmp_path / "cache")

    (tmp_path / "text.gguf").write_text("text")
    cases = {
        tmp_path / "text.gguf": "not a GGUF file",
        write(tmp_path / "m-00001-of-00002.gguf"): "one part of several.*llama-gguf-split --merge",
        write(tmp_path / "lora.gguf", general__type="adapter"): "it holds 'adapter', and no whole model",
        write(tmp_path / "odd.gguf", "wavenet"): "transformers does not read it .*name the model's safetensors",
        write(tmp_path / "long.gguf", tensors=["rope_freqs.weight"]): "it scales its positions",
        write(tmp_path / "yarn.gguf", llama__rope__scaling__type="yarn"): "it scales its positions",
    }
    for file, message in cases.items():
        with pytest.raises(ValueError, match=f"{file.name}: {message}"):
            locate(file)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "odd.gguf").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut.gguf: not a whole GGUF file"):
        locate(tmp_path / "cut.gguf")
    with pytest.raises(ValueError, match="it has 7 GGUF files; name one, such as cut.gguf"):
        locate(tmp_path)


def test_a_first_look_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "m.gguf")
    monkeypatch.setattr(packed, "convert", None)
    assert zoo.look_up(str(file), cache=tmp_path / "cache") is None
