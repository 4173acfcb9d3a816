"""A whole model as GGUF, in the precision that it has: for llama.cpp and what is built on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType
from gguf import get_tensor_name_map as names_of
from gguf.quants import quantize
from torch import Tensor

from offsite.emulator.exports import gguf_tokenizer
from offsite.emulator.exports.llama_cpp import FAMILIES, interleave
from offsite.emulator.zoo import load_base

TYPES = {  # by a model's dtype, what its matrices are in, and the name of a file of such
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
WHOLE = ("llama", "mistral", "qwen2")


def write(file: Path, folder: Path) -> None:
    """Write a model's folder, with its tokenizer and chat template.

    Raises ValueError for a model that GGUF has no place for all of, or whose family is not known here.
    """
    model, tokenizer = load_base(folder, dtype="auto")
    config: Any = model.config
    _refuse(config, model)
    architecture, interleaved = FAMILIES[config.model_type]
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    matrices, kind = TYPES[model.dtype]
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[architecture], use_temp_file=True)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(_head(config))
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    gguf_tokenizer.write(writer, tokenizer, size=config.vocab_size)
    counts = {"q_proj": heads, "k_proj": groups} if interleaved else {}
    for name, tensor in _named(model, architecture, counts):
        plain = tensor.float().numpy()
        if tensor.ndim == 1:  # which llama.cpp has in fp32 always
            writer.add_tensor(name, plain)
        else:
            writer.add_tensor(name, quantize(plain, matrices), raw_dtype=matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(model: Any, architecture: MODEL_ARCH, counts: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors under GGUF's names, but an output that is the embedding."""
    names = names_of(architecture, model.config.num_hidden_layers)
    for path, tensor in model.state_dict().items():
        if path == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{path}: GGUF has no name for this tensor")
        count = counts.get(path.split(".")[-2])
        yield name, interleave(tensor, count).contiguous() if count else tensor


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _refuse(config: Any, model: Any) -> None:
    """Raise ValueError for what would be lost in GGUF, or in reading it."""
    biased = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(".bias")}
    usual = {"q_proj", "k_proj", "v_proj"} if config.model_type == "qwen2" else set[str]()
    position = getattr(config, "rope_parameters", None) or {}
    odd = {
        f"models of type {config.model_type!r} (known are {', '.join(WHOLE)})": config.model_type not in WHOLE,
        "scaled positions (rope_parameters)": position.get("rope_type", "default") != "default",
        "a window of attention": getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", 1),
        f"biases of {', '.join(sorted(biased - usual))}": biased - usual,
        f"weights in {model.dtype}": model.dtype not in TYPES,
    }
    if first := next((what for what, is_so in odd.items() if is_so), ""):
        raise ValueError(f"GGUF is not written of {first}; {gguf_tokenizer.INSTEAD}")
