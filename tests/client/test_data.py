"""`offsite data`, without a process."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offsite.client.commands import data
from offsite.protos.errors import ConflictError, InputError, MismatchError, RefusedError


def printed(*arguments: object) -> str:
    return CliRunner().invoke(data.app, [*map(str, arguments)], catch_exceptions=False).stdout


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "data" / "rows.jsonl"
    file.parent.mkdir()
    lines = [{"frage": f"w{at}", "antwort": "w1 w2"} for at in range(40)] + [{"frage": "w1", "antwort": "w3"}, {"a": 1}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


NAMES = ("--column", "frage=prompt", "--column", "antwort=completion")


def test_rows_are_counted_by_the_names_that_their_owner_has_for_columns(rows: Path, site_files: Path) -> None:
    told = json.loads(printed("check", rows, *NAMES, "--tokenizer", site_files / "bundle", "--format", "json"))
    assert (told["examples"], told["distinct"], told["asked_twice"]) == (41, 41, 1)
    assert told["left_out"][0]["count"] == 1
    sequences = told["sequences"]
    assert sequences["sequences"] == 41 and 0 < sequences["learned"] < sequences["tokens"]
    assert sequences["median"] <= sequences["ninth_decile"] <= sequences["longest"]
    with pytest.raises(InputError, match="found the columns .*--column OWN=READ"):
        printed("check", rows)
    with pytest.raises(InputError, match="'question' is none that is read"):
        printed("check", rows, "--column", "frage=question")
    assert "such as question=prompt" in CliRunner().invoke(data.app, ["check", str(rows), "--column", "x"]).output


def test_a_policy_says_what_columns_are_called_and_where_data_may_be(rows: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('bases = ["any"]\ndata = ["data"]\ncolumns = { frage = "prompt", antwort = "completion" }\n')
    assert "41 in 1 files" in printed("check", rows, "--policy", policy)
    with pytest.raises(RefusedError, match="allows data only in"):
        printed("check", policy, "--policy", policy)


def test_what_is_learned_of_a_row_stands_between_brackets(rows: Path, site_files: Path) -> None:
    shown = printed("preview", rows, *NAMES, "--tokenizer", site_files / "bundle", "--rows", 1, "--skip", 5)
    assert "rows.jsonl, line 6" in shown and "[w1 w2" in shown and "[w5" not in shown and "w5" in shown
    assert json.loads(printed("preview", rows, *NAMES, "--rows", 1).splitlines()[1])["completion"] == "w1 w2"
    with pytest.raises(InputError, match="--skip 99 leaves out all"):
        printed("preview", rows, *NAMES, "--skip", 99)


def test_an_exam_that_is_split_off_passes_and_one_that_is_copied_does_not(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "rows to train on" in printed("split", rows, out, *NAMES, "--share", 0.3)
    train, exam = out / "train.jsonl", out / "held-out.jsonl"
    assert "0 of them known" in printed("check", train, "--held-out", exam)
    with pytest.raises(MismatchError, match="rows of the exam are known from the data"):
        printed("check", rows, *NAMES, "--held-out", exam)
    with pytest.raises(ConflictError):
        printed("split", rows, out, *NAMES)
