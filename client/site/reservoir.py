"""Rows of a site's own that it keeps after a task, as files of its work folder: nothing of them ever leaves.

A file is of one run. Its first line names the run that this one went on from, each other is a row.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offsite.protos.errors import ConflictError


def write(file: Path, rows: Sequence[Mapping[str, Any]], *, before: str) -> None:
    """Write rows that are kept, whole or not at all, for the site's own user alone."""
    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        for line in ({"before": before}, *rows):
            out.write(json.dumps(line, ensure_ascii=False, sort_keys=True, default=str) + "\n")
    partial.replace(file)


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; raises ConflictError where it is damaged."""
    yield from _lines(file)[1:]


def chain(folder: Path, run: str) -> list[Path]:
    """Return the files of a run and of those that it went on from, as far as rows of them were kept, oldest first."""
    files: list[Path] = []
    while run and (file := folder / f"{run}.jsonl").exists() and file not in files:
        files.append(file)
        run = str(_lines(file)[0].get("before", ""))
    return files[::-1]


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as handle:  # not splitlines(), for a row may hold other ends of lines
            lines = [json.loads(line) for line in handle]
    except ValueError:
        lines = []
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise ConflictError(f"{file}: not the rows that were kept of a run; remove it, and the task goes on without")
    return lines
