import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from offsite.emulator.examples import collect, formats
from offsite.emulator.examples.files import AGAIN, OUTSIDE, UNREADABLE
from offsite.emulator.modality import default, read
from offsite.emulator.modality.causal_text.shapes import TextExample

TEXT = default()
TURNS = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_parquet_gives_the_same_as_jsonl(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[::-1]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == read(write(tmp_path / "a.jsonl", *rows))


def test_a_text_file_gives_its_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \n\nthree\n", encoding="utf-8")
    assert read(path) == [TextExample("", "one\ntwo"), TextExample("", "three")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"text": "second"})
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    assert [example.completion for example in read(tmp_path)] == ["first", "second"]


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


def test_links_are_followed_once_and_not_out_of_the_folders_allowed(tmp_path: Path) -> None:
    for name in ("data", "data/sub", "shared", "secret"):
        (tmp_path / name).mkdir()
    for name in ("data/sub/a", "shared/b", "secret/c"):
        write(tmp_path / f"{name}.jsonl", {"text": name})
    links = {"1": "../shared", "2": "../secret", "3.jsonl": "../secret/c.jsonl", "4": ".", "5": "../shared", "6": "6"}
    for name, target in links.items():
        (tmp_path / "data" / name).symlink_to(target)
    data, allowed = tmp_path / "data", [tmp_path / "data", tmp_path / "shared"]
    reading = collect(data, TEXT, folders=allowed)
    assert [one.completion for one in reading.examples] == ["shared/b", "data/sub/a"]
    assert {one.reason: one.count for one in reading.census.left_out} == {OUTSIDE: 2, AGAIN: 2, UNREADABLE: 1}
    with pytest.raises(ValueError, match=f"{data / '2'}: leads to {tmp_path / 'secret'}, out of the folders allowed"):
        read(data, folders=allowed)
    (data / "6").unlink()
    assert [one.completion for one in read(data)] == ["shared/b", "secret/c", "data/sub/a"]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "secret" / "c.jsonl")
    with pytest.raises(ValueError, match="out of the folders allowed"):
        collect(tmp_path / "link.jsonl", TEXT, folders=allowed)


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", {"text": "x"})
    assert [one.reason for one in collect(tmp_path, TEXT).census.left_out] == [UNREADABLE]


def test_a_compressed_file_that_is_cut_off_gives_what_comes_before(tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "{number} {random.Random(number).random()}"}}\n' for number in range(2000))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-5000])
    reading = collect(path, TEXT)
    assert 500 < len(reading.examples) < 2000
    with pytest.raises(
        ValueError, match=rf"a\.jsonl\.gz, after line {len(reading.examples)}: not gzip, or damaged, or cut"
    ):
        read(path)


def test_what_one_piece_or_a_small_file_unpacks_to_has_bounds(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(formats, "PIECE", 100)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 5000))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, after line \d+: unpacks to more than [\d,]+ characters"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.txt").write_text("x" * 101)
    with pytest.raises(ValueError, match="a line has more than 100 characters"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text("[\n" + '"x",\n' * 50)
    with pytest.raises(ValueError, match="a JSON document of more than 100 characters; write JSON Lines"):
        read(tmp_path / "a.json")


CONTENTS = {
    "windows.txt": ("caf\u00e9\r\n\r\nnext\r\n".encode("utf-16"), ["caf\u00e9", "next"]),
    "several.jsonl": (b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', ["a", "b"]),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "one.json": (b'{\n "text": "a",\n "far": 1e999,\n "no": NaN\n}\n', ["a"]),
    "null.ndjson": (b'{"text": "a", "messages": null, "prompt": NaN}\n', ["a"]),
    "semicolons.csv": (b'id;text\n1;"a; ""b""\nc"\n2;d, e\n', ['a; "b"\nc', "d, e"]),
    "table.tsv": (b"text\tid\na, b\t1\n", ["a, b"]),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_are_read_as_programs_write_them(name: str, tmp_path: Path) -> None:
    content, texts = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    assert [one.completion for one in read(tmp_path / name)] == texts


FAULTS = {
    "twice.jsonl": (b'{"text": "a", "text": "b"}', "line 1: an object names a column twice"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1: not JSON that can be read"),
    "wide.csv": (b"text\na\nb,c\n", "line 3: 2 fields under a header of 1; put quotes around a text"),
    "open.csv": (b'text\n"a\n', "line 2: not CSV: "),
    "image.jsonl": (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "line 1: a content part must be",
    ),
    "call.jsonl": (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
        "line 1: a tool call's arguments are not JSON: '{'",
    ),
    "array.json": (b'[{"text": "a"}, ', "not JSON: Expecting value at character"),
    "cut.json": (b'{"text":\n', "not JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_any_format_is_named(name: str, tmp_path: Path) -> None:
    content, fault = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}(, |: ){re.escape(fault)}"):
        read(tmp_path / name)


def test_parquet_is_read_around_what_is_strange(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": "a", "at": 0}]
    far = [turn | {"at": 2**62} for turn in turns]
    kind = pyarrow.struct({"role": "string", "content": "string", "tool_calls": "null", "at": pyarrow.timestamp("us")})
    column = pyarrow.array([turns, far, turns], pyarrow.list_(kind))
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    reading = collect(tmp_path / "a.parquet", TEXT)
    assert [one.place[-5:] for one in reading.examples] == ["row 1", "row 3"]
    assert [one.first for one in reading.census.left_out] == [
        f"{tmp_path / 'a.parquet'}, row 2: its values cannot be read: date value out of range"
    ]
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"] * 7}), tmp_path / "b.parquet")
    assert {one.count for one in collect(tmp_path, TEXT).census.left_out} == {1, 7}


def test_a_long_value_is_quoted_in_part_and_on_one_line(tmp_path: Path) -> None:
    for row in ({"x" * 10**6: 1}, {"messages": [{"role": "\n\x1b[31m" + "x" * 10**6, "content": "a"}]}):
        with pytest.raises(ValueError, match="line 1: ") as refusal:
            read(write(tmp_path / "a.jsonl", row))
        assert len(str(refusal.value)) < 800 and str(refusal.value).isprintable()


def test_duplicates_and_what_is_left_out_are_counted(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        {"text": "a", "id": 1},
        {"text": "a", "id": 2},
        {"text": "bcd"},
        {"txt": "c"},
        {"x": ""},
        3,
    )
    census = collect(tmp_path, TEXT).census
    assert (census.files, census.examples, census.distinct, census.characters, census.longest) == (1, 3, 2, 5, 3)
    assert [one.count for one in census.left_out] == [2, 1]
    shown = dict(census.describe())
    assert shown["duplicates"] == "1, so that 2 are distinct"
    assert shown["left out"].startswith("1 rows that are no objects; first ")


def test_reading_examples_loads_no_heavy_library() -> None:
    code = """import sys; from offsite.emulator.examples import collect; from offsite.emulator.modality import default
default().shapes; print({"torch", "transformers", "pyarrow"} & {*sys.modules})"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
