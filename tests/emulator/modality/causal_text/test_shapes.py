import json
import re
from pathlib import Path
from typing import Any

import pytest

from offsite.emulator.modality import read
from offsite.emulator.modality.causal_text.shapes import TextExample

TURNS = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_each_shape_is_read_and_other_columns_are_ignored(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"text": "a text", "id": 1},
        {"prompt": "p", "completion": "c", "source": "x"},
        {"messages": TURNS},
    )
    assert read(path) == [TextExample("", "a text"), TextExample("p", "c"), TextExample("", "", tuple(TURNS))]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": "q", "answer": "a"}, "found the columns ['answer', 'question']; expected"),
        ({"text": 3}, "'text' must be a text, found int"),
        ({"text": "  "}, "'text' is empty"),
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role must be one of system, developer, user"),
        ({"messages": TURNS[:1]}, "needs a turn of the assistant"),
        (["a", "list"], "found list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, fault: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "good"}, row)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ") + ".*" + re.escape(fault)):
        read(path)


def test_of_turns_in_a_prompt_none_is_learned(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (one,) = read(write(tmp_path / "a.jsonl", {"prompt": asked, "completion": "d", "tools": '[{"name": "f"}]'}))
    assert [turn.get("weight", 1) for turn in one.messages] == [1, 0, 1, 1]
    assert one.tools == ({"name": "f"},)
    assert read(write(tmp_path / "b.jsonl", one.row)) == [one]
