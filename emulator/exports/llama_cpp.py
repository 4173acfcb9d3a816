"""LoRA as GGUF, which llama.cpp takes beside a model of its own (`--lora FILE`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map
from torch import Tensor

from offsite.emulator.exports.uniform import Uniform

# By a model's own type: what llama.cpp calls it, and whether it interleaves the halves of queries and keys there.
FAMILIES = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
}


def write(file: Path, adapter: Uniform, base: dict[str, Any]) -> None:
    """Write an adapter of a model whose config.json is `base`.

    Raises ValueError for a family that this does not know, or a map that has no name there.
    """
    kind = str(base.get("model_type"))
    if kind not in FAMILIES:
        raise ValueError(f"models of type {kind!r} are not written as GGUF; expected one of {', '.join(FAMILIES)}")
    architecture, interleaved = FAMILIES[kind]
    tensors = dict(_named(adapter, base, architecture, interleaved=interleaved))
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[architecture])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, str(adapter.config["peft_type"]).lower())
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(adapter.rank))  # / rank: scale 1
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(
    adapter: Uniform, base: dict[str, Any], architecture: MODEL_ARCH, *, interleaved: bool
) -> Iterator[tuple[str, Tensor]]:
    names = get_tensor_name_map(architecture, int(base["num_hidden_layers"]))
    heads = int(base["num_attention_heads"])
    counts = {"q_proj": heads, "k_proj": int(base.get("num_key_value_heads") or heads)}
    for path, pair in sorted(adapter.pairs.items()):
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"{path}: GGUF has no name for this map")
        count = counts.get(path.rpartition(".")[2]) if interleaved else None
        yield f"{name}.lora_a", pair.A
        yield f"{name}.lora_b", interleave(pair.B, count).contiguous() if count else pair.B


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from (first halves, second halves) to pairs, as GGUF's family of Llama has them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
