"""How a task's rows are shared out among its sites."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from offsite.client.demo.data import SiteData
from offsite.client.demo.play import Settings
from offsite.client.demo.stream import Stream, _shared
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice


def test_rows_are_shared_out_whole_whatever_they_hold(tmp_path: Path) -> None:
    rows = [{"text": f"a\u2028b \x85 c {number}"} for number in range(5)]
    train = tmp_path / "wards" / "train.jsonl"
    train.parent.mkdir()
    train.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    sites = _shared(SiteData("wards", train, "notes", held_out=tmp_path / "exam.jsonl"))
    assert [site.name for site in sites] == ["wards-1", "wards-2"]
    shares = [[json.loads(line) for line in site.train.read_text("utf-8").split("\n") if line] for site in sites]
    assert shares == [rows[0::2], rows[1::2]]
    train.write_text("{}\n")
    with pytest.raises(InputError, match="task wards has 1 rows to train on, and 2 sites share it"):
        _shared(SiteData("wards", train, "notes", held_out=tmp_path / "exam.jsonl"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "a-1"), "--site a: it is shared out as a-1, a-2, and a-1 is a task too"),
        (("a" * 39,), "the name is too long for a task; take one of 37 at most"),
    ],
)
def test_names_that_its_sites_cannot_have_are_refused_before_anything_is_made(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    sites: Any = {name: tmp_path / "data.jsonl" for name in names}
    settings = Settings(out=tmp_path / "out", sites=sites, memory=Choice(name="none"))
    with pytest.raises(InputError, match=words):
        Stream(settings, Console(quiet=True), format="text").stream()
    assert not (tmp_path / "out").exists()
