"""How a data set is cut: every row once, the same for the same seed, and skewed where that is asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offsite.deploy.simulation.data import Cut, open_data
from offsite.deploy.simulation.partition import PARTITIONS
from offsite.emulator import modality
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse_one

ROWS = 200


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of five authors, each longer than the one before."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"{number} " + "word " * number, "author": f"author {number % 5}"} for number in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cut(file: Path, recipe: str, sites: int, seed: int = 0) -> list[list[int]]:
    """Return which rows each site has."""
    data = Cut(file, sites, parse_one(recipe), seed=seed, odd_rows="refuse", reader=modality.default())
    parts = [[int(row.completion.split()[0]) for row in data.reading(site).examples] for site in data.names]
    assert data.counts == [len(part) for part in parts]
    return parts


RECIPES = ["iid", "length", "dirichlet(alpha=0.2)", 'dirichlet(alpha=0.2,column="author")', 'key(column="author")']


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_row_is_at_one_site_and_every_site_has_one(file: Path, recipe: str) -> None:
    parts = cut(file, recipe, 5)
    assert sorted(row for part in parts for row in part) == list(range(ROWS)) and all(parts)
    assert parts == cut(file, recipe, 5), "the same for the same seed"
    if "iid" in recipe or "dirichlet" in recipe:
        assert parts != cut(file, recipe, 5, seed=1)


def test_each_site_may_draw_rows_that_others_have_too(file: Path) -> None:
    parts = cut(file, "iid(rows=16)", 100)
    assert {len({*part}) for part in parts} == {16} and len({tuple(part) for part in parts}) == 100


def test_sites_differ_by_what_was_asked_for(file: Path) -> None:
    lengths = cut(file, "length", 4)
    assert all(max(before) < min(after) for before, after in zip(lengths, lengths[1:], strict=False))
    assert all(len({row % 5 for row in part}) == 1 for part in cut(file, 'key(column="author")', 5))

    def kinds(alpha: float) -> float:
        parts = cut(file, f'dirichlet(alpha={alpha},column="author")', 5)
        return float(np.mean([max(np.bincount([row % 5 for row in part])) / len(part) for part in parts]))

    assert kinds(0.05) > 0.6 > 0.35 > kinds(100.0), "the share of a site's most frequent kind"


@pytest.mark.parametrize(
    ("recipe", "sites", "why"),
    [
        ("iid", 201, r"200 rows, too few for 201 sites; have each draw some of them: iid\(rows=16\)"),
        ("iid(rows=201)", 2, "each site is to draw 201 rows, the data has 200"),
        ('key(column="author")', 6, "column 'author' has 5 values, too few for 6 sites"),
        ('key(column="topic")', 2, "rows.jsonl, line 1: has no column 'topic'; it has author, text"),
        ("dirichlet(alpha=0.0)", 2, "alpha must be positive"),
        ("halves", 2, "there is no partition 'halves'.*known are dirichlet, iid, key, length"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_sentence(file: Path, recipe: str, sites: int, why: str) -> None:
    with pytest.raises(InputError, match=why):
        open_data(file, sites, parse_one(recipe), seed=0, odd_rows="skip")


def test_a_folder_has_a_site_for_each_of_its_entries(file: Path, tmp_path: Path) -> None:
    (tmp_path / "bank.jsonl").write_text('{"text": "of the bank"}\n')
    (tmp_path / "ward").mkdir()
    (tmp_path / "ward" / "a.txt").write_text("of the ward")
    (tmp_path / ".hidden").write_text("nothing")
    data = open_data(tmp_path, None, parse_one("iid"), seed=0, odd_rows="skip")
    rows: dict[str, Any] = {site: data.reading(site).examples for site in data.names}
    assert list(rows) == ["bank", "ward"] and rows["ward"][0].completion == "of the ward"
    with pytest.raises(InputError, match="into how many sites is it to be cut"):
        open_data(file, None, parse_one("iid"), seed=0, odd_rows="skip")
    (tmp_path / "a site.jsonl").touch()
    with pytest.raises(InputError, match="a site.* no name of a site"):
        open_data(tmp_path, None, parse_one("iid"), seed=0, odd_rows="skip")


def test_all_partitions_are_there() -> None:
    assert [PARTITIONS[name].name for name in PARTITIONS] == list(PARTITIONS)
