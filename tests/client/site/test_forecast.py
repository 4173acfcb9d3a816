import io
import json
from pathlib import Path
from typing import Any

import pytest

from offsite.client.site import forecast
from offsite.emulator.examples import Source
from offsite.protos.errors import InputError


@pytest.mark.parametrize(("odd_rows", "code"), [("skip", 0), ("refuse", 3)])
def test_what_becomes_of_the_rows_is_known_before_a_task(
    site_files: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, odd_rows: str, code: int
) -> None:
    rows = [{"text": "w1 w2"}, {"text": " ".join(["w3"] * 50)}, {"prompt": " ".join(["w4"] * 30), "completion": "w5"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"question": "w6"}])))
    asked = {
        "data": str(tmp_path),
        "tokenizer": str(site_files / "bundle"),
        "folders": [],
        "odd_rows": odd_rows,
        "columns": {},
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked | {"max_length": 20, "objective": "supervised"})))
    assert forecast.main() == code
    out, err = capfd.readouterr()
    if code:
        assert out == "" and "a.jsonl, line 4: found the columns ['question']" in err
        return
    told = json.loads(out)
    assert "1 of 5 sequences have nothing to learn" in told.pop("warnings")[0]
    assert told == {"sequences": 4, "divided": 1, "cut": 1, "without_target": 1, "left_out": 0}


def test_rows_of_answers_to_compare_are_counted_as_comparisons(
    site_files: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    rows = [{"prompt": "w1", "chosen": f"w{at}", "rejected": "w9 w8"} for at in (2, 3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "w6"}])))
    asked = {
        "data": str(tmp_path),
        "tokenizer": str(site_files / "bundle"),
        "folders": [],
        "odd_rows": "skip",
        "columns": {},
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked | {"max_length": 20, "objective": "dpo"})))
    assert forecast.main() == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["sequences"], told["without_target"], told["warnings"]) == (2, 0, [])


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: not a folder"):
        forecast.forecast(Source(tmp_path), tmp_path / "none", max_length=8)
