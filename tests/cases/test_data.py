"""Files of data that were taken for something else, or left out in part without a word, and what is right."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from offsite.emulator.examples import collect
from offsite.emulator.modality import default, read
from offsite.emulator.modality.causal_text.shapes import TextExample

TEXT = default()
DATA = Path(__file__).parent / "data"
KETTLES = TextExample("", "Blue kettles boil at noon.")
FRUIT = ({"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Pear."})
CONVERSATION = [TextExample("", "", FRUIT)]


def chat(*turns: str) -> TextExample:
    return TextExample("", "", tuple(dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns))


COLOURS = [chat(f"user: colour {number}?", "assistant: green") for number in range(9)]
CLOCK = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": {}}}

READ: dict[str, list[TextExample]] = {
    "UPPER.JSONL": [KETTLES],
    "alpaca.jsonl": [TextExample("Name a fruit.", "Pear.")],
    "array-pretty-named.jsonl": [KETTLES, KETTLES],
    "array.json": [KETTLES, KETTLES],
    "bom-own-line.jsonl": [KETTLES, KETTLES],
    "chat.jsonl": COLOURS[:8],
    "content-parts.jsonl": CONVERSATION,
    "conversations-openai.jsonl": CONVERSATION,
    "folder-appledouble": [KETTLES],
    "folder-case": [TextExample("", "capital letters"), KETTLES, TextExample("", "small letters")],
    "folder-gz": [KETTLES, KETTLES],
    "folder-nested": [TextExample("", "deep"), TextExample("", "top")],
    "prompt-completion-as-messages.jsonl": CONVERSATION,
    "prompt-null-text-filled.jsonl": [TextExample("", "Plain.")],
    "sharegpt.jsonl": CONVERSATION,
    "starts-with-assistant.jsonl": [chat("assistant: Hello.", "user: Hi.", "assistant: What now?")],
    "system.jsonl": [*COLOURS, chat("system: Be kind.", "user: colour 1?", "assistant: green")],
    "table.csv": [TextExample("", "hello there")],
    "timestamp-far.parquet": [TextExample("", "a b"), TextExample("", "c d")],
    "tool-call-null-content.jsonl": [
        TextExample(
            "",
            "",
            (
                {"role": "user", "content": "Time?"},
                {"role": "assistant", "content": "", "tool_calls": [CLOCK]},
                {"role": "tool", "content": "noon", "tool_call_id": "a"},
                {"role": "assistant", "content": "It is noon."},
            ),
        )
    ],
}

REFUSED = {
    "leak-columns.jsonl": "line 1: found the columns ['a private sentence of this site']; expected",
    "leak-role.jsonl": "line 1: a message's role must be one of system, developer, user, human, assistant",
    "surrogate-last.jsonl": "line 10: 'text' holds half a character, or bytes that are not UTF-8",
    "deep.jsonl": "line 1: its lists or objects are nested too deeply",
    "damaged-middle.parquet": "row 1: the rest of row group 1 is damaged: ",
}


def deep(folder: Path) -> None:
    (folder / "deep.jsonl").write_text('{"text":"a","meta":' + "[" * 100_000 + "]" * 100_000 + "}\n")


def damaged(folder: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=400)) for _ in range(2000)]
    path = folder / "damaged-middle.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="none")
    page = pyarrow.parquet.read_metadata(path).row_group(0).column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(page)
        file.write(b"\xfc" * 50)


MADE: dict[str, Callable[[Path], object]] = {"deep.jsonl": deep, "damaged-middle.parquet": damaged}


def test_every_case_is_decided() -> None:
    assert {path.name for path in DATA.iterdir()} | MADE.keys() == READ.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", READ)
def test_it_is_read(name: str) -> None:
    assert read(DATA / name) == READ[name]
    census = collect(DATA / name, TEXT).census
    assert (census.examples, census.distinct) == (len(READ[name]), len({repr(one) for one in READ[name]}))
    left_out = {"folder-appledouble": [("hidden files and folders", 1)]}.get(name, [])
    assert [(one.reason, one.count) for one in census.left_out] == left_out


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_sentence_with_its_place_or_left_out_and_counted(name: str, tmp_path: Path) -> None:
    MADE.get(name, lambda folder: shutil.copy(DATA / name, folder))(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}, {REFUSED[name]}")) as refusal:
        read(tmp_path)
    assert len(str(refusal.value)) < 700 and "\n" not in str(refusal.value)
    (tmp_path / "sound.jsonl").write_text('{"text": "sound"}')
    counted = collect(tmp_path, TEXT).census
    assert counted.examples == {"surrogate-last.jsonl": 10}.get(name, 1)
    assert [(one.count, one.first) for one in counted.left_out] == [
        ({"damaged-middle.parquet": 2000}.get(name, 1), str(refusal.value))
    ]
