"""Models in GGUF files: dequantised once, into safetensors with a tokenizer, as transformers reads them.

Tensor libraries are imported where a file is read.
"""

import contextlib
import copy
import hashlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from offsite.emulator.zoo.files import one_line

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"


def within(path: Path) -> Path | None:
    """Return the GGUF file that a path names, or that is all there is of a model in a folder; raises ValueError."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"model folder {path}: it has {len(files)} GGUF files; name one, such as {files[0].name}")
    return files[0] if files else None


def place(file: Path, *, cache: Path) -> Path:
    """Return where the cache has, or would have, the model of a file: by its bytes, which are read once."""
    state = file.resolve().stat()
    seen = hashlib.sha256(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    note = cache / "models" / "gguf" / f"{seen[:32]}.sha256"
    if not note.is_file():
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(digest)
    return note.with_name(note.read_text())


def unpacked(file: Path, *, cache: Path) -> Path:
    """Return the folder of a file's model, read into the cache if it is not there; raises ValueError."""
    with file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise ValueError(f"{file}: not a GGUF file, whose first bytes are {MAGIC.decode()}")
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise ValueError(f"{file}: one part of several; put them together with llama.cpp's llama-gguf-split --merge")
    folder = place(file, cache=cache)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            # Beside its final place, so that the rename is atomic: a folder that is there is whole.
            with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as temporary:
                convert(file, Path(temporary) / "model")
                (Path(temporary) / "model").rename(folder)
    return folder


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file as safetensors with its tokenizer and chat template; raises ValueError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from offsite.emulator.quiet import quiet

    _refuse(gguf)
    dtype = _dtype(gguf)
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar obeys no setting
        try:
            packed, report = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise ValueError(
                f"{gguf}: transformers does not read it ({one_line(error)}); name the model's safetensors instead"
            ) from None
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{gguf}: it has no {missing[0]}, without which the model would be random; fetch it again")
        # transformers will not save a model that it loaded from GGUF, so its weights move into one it did not.
        config = copy.deepcopy(packed.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
        plain.load_state_dict(packed.state_dict())
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
    _trim(out / "tokenizer.json", size=plain.get_input_embeddings().num_embeddings)


def _trim(file: Path, *, size: int) -> None:
    """Take out tokens that the reader adds beyond those that the model has, such as a word for what is unknown."""
    document = json.loads(file.read_text(encoding="utf-8"))
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < size]
    file.write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")


def _tensors(gguf: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(gguf)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{gguf}: not a whole GGUF file ({one_line(error)}); fetch it again") from None


def _refuse(gguf: Path) -> None:
    """Raise ValueError for what transformers would leave out in silence, or what is no model."""
    reader = _tensors(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("general.")}
    if fields.get("general.type", "model") != "model":
        raise ValueError(f"{gguf}: it holds {fields['general.type']!r}, and no whole model")
    kinds = {name: field.contents() for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")}
    scaled = any(kind != "none" and not name.startswith("gpt-oss") for name, kind in kinds.items())
    if scaled or any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        raise ValueError(
            f"{gguf}: it scales its positions, as Llama 3.1 does, which transformers leaves out when it reads GGUF: "
            "name the model's safetensors instead"
        )


def _dtype(gguf: Path) -> "torch.dtype":
    """Return fp32 or fp16 where most matrices are, else bf16, which holds the few bits of others."""
    import torch

    kinds = [tensor.tensor_type.name for tensor in _tensors(gguf).tensors if len(tensor.shape) > 1]
    usual = max({*kinds}, key=kinds.count, default="")
    return {"F32": torch.float32, "F16": torch.float16}.get(usual, torch.bfloat16)
