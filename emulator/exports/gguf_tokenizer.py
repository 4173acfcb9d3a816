"""A tokenizer as GGUF has it: byte-level BPE, whose way to cut a text into words llama.cpp knows by a name."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

# How Llama 3 cuts a text before it merges bytes, with up to so many digits in one piece; Qwen 2 has each by itself.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
INSTEAD = "convert the merged model with llama.cpp's own convert_hf_to_gguf.py"
CUTS = {SPLIT % "{1,3}": "llama-bpe", SPLIT % "": "qwen2", "digits": "smollm", "": "gpt-2"}


def write(writer: GGUFWriter, tokenizer: Any, *, size: int) -> None:
    """Add a tokenizer to a model of `size` embeddings; raises ValueError for one that llama.cpp would not know."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = _cut(backend)
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = {number: TokenType.CONTROL if one.special else TokenType.USER_DEFINED for number, one in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    usual = [TokenType.NORMAL if number in words else TokenType.UNUSED for number in range(size)]
    writer.add_token_types([kinds.get(number, kind) for number, kind in enumerate(usual)])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in backend["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _cut(backend: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a text is cut; raises ValueError where it has none that is known here."""
    outer = backend["pre_tokenizer"] or {}
    steps = outer.get("pretokenizers", [outer])
    if backend["model"]["type"] != "BPE" or not steps or steps[-1].get("type") != "ByteLevel":
        raise ValueError(f"its tokenizer is no byte-level BPE, and no other is written as GGUF; {INSTEAD}")
    pattern = ""
    for step in steps[:-1]:
        pattern += "digits" if step["type"] == "Digits" and step["individual_digits"] else _pattern(step)
    composed = (backend["normalizer"] or {}).get("type") in (None, "NFC")  # which llama.cpp leaves as they are
    if pattern not in CUTS or not composed:
        raise ValueError(
            f"its tokenizer cuts texts in a way that is not known here, but may be to llama.cpp; {INSTEAD}"
        )
    return CUTS[pattern]


def _pattern(step: dict[str, Any]) -> str:
    pattern = step.get("pattern", {})
    return str(pattern.get("Regex", step))
