"""Published adapters, on the machine of whoever fetched them. A tensor library is loaded when they are read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from offsite.protos.errors import ConflictError, InputError

Form = Literal["vllm", "gguf", "merged"]


def compose(out: str | Path, adapters: Sequence[str | Path], *, without: Sequence[str | Path] = ()) -> Path:
    """Write the sum of published adapters of one base, which `offsite.emulator.plug.load` puts beside that base.

    Each has to be of a method that trains single entries of maps, as `lt-sft`, `spiel` and `sara` do. The same adapters
    give the same bytes in any order.

    Args:
        out: a new folder.
        adapters: folders of adapters, such as `adapter/` of a run's files.
        without: folders of those that are taken off again.

    Returns the folder. Raises ConflictError if it has files, and InputError if the adapters have no sum.
    """
    folder, added, taken = _new(out), _folders(adapters), _folders(without)
    from offsite.emulator import composition  # torch

    try:
        composition.compose(folder, added, without=taken)
    except ValueError as error:
        raise InputError(str(error)) from error
    return folder


def export(out: str | Path, adapter: str | Path, form: Form, *, base: str | Path | None = None, rank: int = 0) -> float:
    """Write a published adapter in another form, and return what it lost of the norm of its change, as a share.

    Args:
        out: a new folder.
        adapter: the folder of an adapter, such as `adapter/` of a run's files.
        form: "vllm", LoRA in peft's format at one rank, as it takes it; "gguf", the same for llama.cpp, in
            adapter.gguf, or, of the folder of a model such as `merged/`, the whole of it, in model.gguf; "merged", the
            whole model as safetensors, of any method that can be merged.
        base: the folder of the base, for the last two where they are of an adapter.
        rank: of "vllm" and "gguf", from 1; 0 is the largest of the adapter, which loses nothing.

    Raises ConflictError if the folder has files, and InputError for an adapter that has no such form.
    """
    folder, source = _new(out), Path(adapter).expanduser()
    whole = form == "gguf" and (source / "config.json").is_file()
    if form != "vllm" and base is None and not whole:
        raise InputError(f"the form {form} is made with the base: name its folder")
    own_base = Path(base or "").expanduser()
    try:
        if form == "merged":
            from offsite.emulator.exports import merged

            merged.write(folder, source, own_base)
            return 0.0
        if whole:
            from offsite.emulator.exports import gguf_model

            gguf_model.write(folder / "model.gguf", source)
            return 0.0
        from offsite.emulator.exports import uniform

        own = uniform.read(source, rank)
        if form == "vllm":
            uniform.write(folder, own)
        else:
            from offsite.emulator.exports import llama_cpp

            llama_cpp.write(folder / "adapter.gguf", own, _config(own_base))
        return own.lost
    except ValueError as error:
        raise InputError(str(error)) from error


def _config(base: Path) -> dict[str, Any]:
    """Read the configuration of a model's folder; raises ValueError."""
    file = base / "config.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected the base's configuration; {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{file}: expected a table")
    return document


def _new(path: str | Path) -> Path:
    """Return the path of a folder that is not there or empty; raises ConflictError."""
    folder = Path(path).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConflictError(f"{folder}: not empty; an adapter is everything in its folder, so name a new one")
    return folder


def _folders(paths: Sequence[str | Path]) -> list[Path]:
    return [Path(path).expanduser() for path in paths]
