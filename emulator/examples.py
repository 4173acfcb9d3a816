"""Training examples from the files a data owner already has. Imports no tensor library."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = '{"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}'
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One example: a completion to learn after a prompt, or a conversation. A plain text is a completion alone."""

    prompt: str
    completion: str
    messages: tuple[dict[str, str], ...] = ()


def read(path: Path) -> list[Example]:
    """Read a JSONL, Parquet or text file (a paragraph per example), or a folder of these in order of their names.

    Raises ValueError that names the file, the line (in Parquet the row) and what was expected there.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of examples")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not files:
            raise ValueError(f"{path}: the folder holds no file ending in {', '.join(_READERS)}")
        return [example for file in files for example in read(file)]
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: examples are read from files ending in {', '.join(_READERS)}")
    examples = list(_READERS[path.suffix](path))
    if not examples:
        raise ValueError(f"{path}: the file holds no example; expected {SHAPES}")
    return examples


def _jsonl(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{where}: not JSON in UTF-8: {error}") from None
            yield _example(row, where)


def _parquet(path: Path) -> Iterator[Example]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None
    with file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield _example(row, f"{path}, row {number}")


def _paragraphs(path: Path) -> Iterator[Example]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: not UTF-8: {error}") from None
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield Example("", "\n".join(paragraph))
            paragraph = []


_READERS = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _paragraphs}


def _example(row: Any, where: str) -> Example:
    """Tell the shape of a row by its columns; columns beside the shape's own are ignored."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object of the shape {SHAPES}, found {type(row).__name__}")
    if row.get("messages") is not None:
        return Example("", "", _messages(row["messages"], where))
    if "prompt" in row and "completion" in row:
        return Example(_text(row, "prompt", where), _text(row, "completion", where, filled=True))
    if "text" in row:
        return Example("", _text(row, "text", where, filled=True))
    raise ValueError(f"{where}: found the columns {sorted(row)}; expected {SHAPES}")


def _text(row: dict[str, Any], column: str, where: str, *, filled: bool = False) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} must be a text, found {type(value).__name__}")
    if filled and not value.strip():
        raise ValueError(f"{where}: {column!r} is empty; there is nothing to learn from it")
    return value


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{where}: 'messages' must be a list of {{'role', 'content'}}")
    for turn in value:
        if turn.get("role") not in ROLES:
            raise ValueError(f"{where}: a message's role must be one of {', '.join(ROLES)}, found {turn.get('role')!r}")
    turns = tuple({"role": turn["role"], "content": _text(turn, "content", where)} for turn in value)
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise ValueError(f"{where}: 'messages' needs a turn of the assistant to learn from")
    return turns
