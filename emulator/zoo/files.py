"""What of a model folder is its checkpoint. Imports no tensor library: to find a model takes no seconds."""

import json
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # what else a model is read from: configuration and tokenizer


def files_of(folder: Path) -> list[Path]:
    """Return the files that a model is read from, its weights among them; raises ValueError."""
    beside = {path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
    return sorted({*weight_files(folder), *beside})


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights by transformers' own rule, in order of their names; raises ValueError.

    They are `model.safetensors`, else those that `model.safetensors.index.json` names. No other file counts.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_bytes())
            named, _ = set(index["weight_map"].values()), index["metadata"]  # transformers asks for both
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f'{folder / INDEX}: not an index of weights, a JSON table with "metadata" and "weight_map"'
            ) from None
        for name in named:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder / INDEX}: it names {str(name)[:200]!r}, which is no file of this folder")
        return [folder / name for name in sorted(named)]
    others = sorted(
        path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    there = f", only {others[0]}" if others else ""
    if others and not others[0].endswith(".safetensors"):
        there += ", and pickled weights are refused because loading them runs code"
    raise ValueError(f"model folder {folder}: no {WEIGHTS} or {INDEX}{there}; save the model as safetensors")


def one_line(error: object) -> str:
    """Return what an error says as one line of at most a few hundred characters, each fit for a terminal."""
    line = " ".join(str(error).split())[:300] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line)
