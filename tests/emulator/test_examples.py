import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from offsite.emulator.examples import Example, read

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
    assert read(path) == [Example("", "a text"), Example("p", "c"), Example("", "", tuple(TURNS))]


def test_parquet_gives_the_same_as_jsonl(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[::-1]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == read(write(tmp_path / "a.jsonl", *rows))


def test_a_text_file_gives_its_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \n\nthree\n", encoding="utf-8")
    assert read(path) == [Example("", "one\ntwo"), Example("", "three")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"text": "second"})
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    assert [example.completion for example in read(tmp_path)] == ["first", "second"]


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


def test_a_line_that_is_not_json_is_named_and_blank_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON"):
        read(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*not UTF-8"):
        read(path)


def test_a_bad_row_of_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "good"}, {"text": ""}]), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' is empty"):
        read(path)
    path.write_bytes(b"no table")
    with pytest.raises(ValueError, match="not a Parquet file"):
        read(path)


def test_a_text_file_in_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3: .*not UTF-8"):
        read(path)


def test_what_holds_no_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="holds no example; expected"):
        read(tmp_path)
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text("\n\n", encoding="utf-8")
        with pytest.raises(ValueError, match="holds no example"):
            read(tmp_path / name)
    (tmp_path / "a.xls").write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(ValueError, match="are read from files ending in"):
        read(tmp_path / "a.xls")


def test_reading_examples_loads_no_heavy_library() -> None:
    code = "import sys, offsite.emulator.examples; print({'torch', 'transformers', 'pyarrow'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
