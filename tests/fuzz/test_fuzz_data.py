"""Files of data, whatever is in them: examples that can be learned from, or one sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from offsite.emulator.examples import Fault, collect
from offsite.emulator.modality import default
from offsite.emulator.modality.causal_text import chat
from offsite.emulator.modality.causal_text.shapes import learned

from .hostile import as_json, changed, told

TEXT = default()
CASES = Path(__file__).parents[1] / "cases"
FILES = sorted(path for path in (CASES / "data").rglob("*") if path.is_file())
TEMPLATES = sorted((CASES / "templates").iterdir())
TOOL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": 1}}}
ROWS: list[dict[str, Any]] = [
    {"text": "a", "id": 1},
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [TOOL]},
            {"role": "tool", "content": "b"},
            {"role": "assistant", "content": "c", "weight": 1, "reasoning_content": "d"},
        ],
        "tools": [TOOL],
    },
]


def read_or_told(path: Path) -> list[Any]:
    """Read in both ways; what is strict gives the same or an error, and every sentence is short."""
    try:
        reading = collect(path, TEXT)
    except ValueError as error:
        told(error)
        return []
    for left_out in reading.census.left_out:
        told(ValueError(left_out.first))
    try:
        assert collect(path, TEXT, odd_rows="refuse").examples == reading.examples
    except ValueError as error:
        told(error)
        assert reading.census.left_out
    return reading.examples


@given(rows=st.lists(st.sampled_from(ROWS).flatmap(changed), max_size=4), array=st.booleans())
def test_rows_are_examples_that_read_the_same_again_or_one_sentence(
    rows: list[Any], array: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(as_json(rows) if array else b"\n".join(map(as_json, rows)))
    examples = read_or_told(tmp_path / "a.json")
    if examples:
        (tmp_path / "b.jsonl").write_text("".join(json.dumps(one.row) + "\n" for one in examples))
        assert collect(tmp_path / "b.jsonl", TEXT, odd_rows="refuse").examples == examples


@given(
    file=st.sampled_from(FILES),
    ending=st.sampled_from(["", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"]),
    splices=st.lists(st.tuples(st.integers(0), st.integers(0, 9), st.binary(max_size=9)), max_size=4),
    cut=st.none() | st.integers(0),
    packed=st.booleans(),
)
def test_bytes_are_examples_or_one_sentence(
    file: Path, ending: str, splices: list[Any], cut: int | None, packed: bool, tmp_path: Path
) -> None:
    content = file.read_bytes()
    for place, dropped, added in splices:
        place %= len(content) + 1
        content = content[:place] + added + content[place + dropped :]
    path = tmp_path / f"a{ending or file.suffix}{'.gz' * packed}"
    content = gzip.compress(content) if packed else content
    path.write_bytes(content if cut is None else content[: cut % (len(content) + 1)])
    read_or_told(path)


class Renderer:
    """A tokenizer as far as a chat template needs one."""

    def __init__(self, template: str) -> None:
        self.template = template

    def get_chat_template(self, tools: Any) -> str:
        return self.template

    def apply_chat_template(self, turns: Any, *, tools: Any, chat_template: str, tokenize: bool, **given: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        return str(render_jinja_template([turns], tools=tools, chat_template=chat_template, **given)[0][0])


@given(row=changed(ROWS[-1]), template=st.sampled_from(TEMPLATES))
def test_conversations_are_learned_where_the_assistant_answers_or_one_sentence(
    row: Any, template: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_json(row))
    for example in read_or_told(path):
        try:
            sequences = chat.pieces(example, Renderer(template.read_text()))
        except Fault as fault:
            told(fault)
            continue
        answers = [turn["content"].strip() for turn in example.messages if learned(turn)]
        taught = [text for sequence in sequences for text, is_learned in sequence if is_learned]
        assert len(taught) <= max(len(answers), 1)
