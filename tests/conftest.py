"""Tiny random models of every family the anatomy must understand, a tokenizer of words, and texts for them.

Two workers on two cores: each computes with one thread, and none spins while it waits. What brings a tensor library is
imported where it is used, so that tests that need none start without it.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

VOCABULARY = 96
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = TOKENS | {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = PLAIN | {"num_key_value_heads": 2, "head_dim": 8}
BLOCK = TOKENS | {"hidden_size": 32, "n_head": 4}


def windowed(layers: int) -> dict[str, Any]:
    """Every other layer looks at a short window only, which the configuration says layer by layer."""
    return GROUPED | {"sliding_window": 4, "layer_types": (["sliding_attention", "full_attention"] * layers)[:layers]}


CONFIGS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "llama": ("LlamaConfig", lambda n: GROUPED | {"num_hidden_layers": n, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", lambda n: windowed(n) | {"num_hidden_layers": n, "use_sliding_window": True}),
    "qwen3": ("Qwen3Config", lambda n: GROUPED | {"num_hidden_layers": n}),
    "mistral": ("MistralConfig", lambda n: GROUPED | {"num_hidden_layers": n, "sliding_window": 4}),
    "gemma": ("GemmaConfig", lambda n: GROUPED | {"num_hidden_layers": n}),
    "gemma2": ("Gemma2Config", lambda n: windowed(n) | {"num_hidden_layers": n, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", lambda n: windowed(n) | {"num_hidden_layers": n, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", lambda n: TOKENS | {"n_embd": 32, "n_head": 4, "n_layer": n, "n_positions": 64}),
    "opt": ("OPTConfig", lambda n: PLAIN | {"ffn_dim": 48, "num_hidden_layers": n, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", lambda n: BLOCK | {"n_layer": n}),
    "gpt_neox": ("GPTNeoXConfig", lambda n: PLAIN | {"num_hidden_layers": n}),
}

Tiny = Callable[..., Any]


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny() -> Tiny:
    """A maker of random models, each with layers that differ clearly from each other."""
    import torch
    import transformers

    torch.set_num_threads(1)  # these models are too small to share out

    def make(family: str = "llama", layers: int = 6) -> Any:
        torch.manual_seed(0)
        config, settings = CONFIGS[family]
        configuration = getattr(transformers, config)(**settings(layers))
        model = transformers.AutoModelForCausalLM.from_config(configuration).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stage of another package, known by its name: what it leaves out of an update is fed back."""
    from importlib.metadata import EntryPoint

    from offsite.protos.upload import STAGES

    monkeypatch.syspath_prepend(Path(__file__).parent / "plugin")
    monkeypatch.setitem(STAGES._found, "top", [EntryPoint("top", "offsite_top:Top", STAGES.group)])
    return STAGES["top"]


@pytest.fixture
def ids() -> Any:
    """Two sequences of token ids, (2, 14)."""
    import torch

    return torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tokenizer() -> Any:
    """Words w3 .. w95 and the characters of a chat, with a token that starts every text."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, 90)), "user", "assistant", "system", ":"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*words, "?"])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )


CHAT = (
    "<s>{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    """The same tokenizer with a chat template."""
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def text(tokenizer: Any) -> list[Any]:
    """Batches of prompts and answers of differing lengths."""
    import torch

    from offsite.emulator.batches import evaluation_batches
    from offsite.emulator.modality import encode
    from offsite.emulator.modality.causal_text.shapes import TextExample

    drawn = torch.randint(3, 90, (12, 20), generator=torch.Generator().manual_seed(7)).tolist()
    examples = [
        TextExample(" ".join(f"w{word}" for word in row[:5]), " ".join(f"w{word}" for word in row[5 : 8 + number]))
        for number, row in enumerate(drawn)
    ]
    return evaluation_batches(encode(examples, tokenizer, max_length=24), batch_size=4)


@pytest.fixture
def offsite(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line in this process: what it would say in one of its own, which takes seconds to import, and its
    exit code."""

    def run(*arguments: str) -> CompletedProcess[str]:
        from offsite.client import cli

        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["offsite", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return CompletedProcess(arguments, int(end.value.code or 0), *capfd.readouterr())

    return run
