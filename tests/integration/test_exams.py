"""Evaluation at the sites over real processes: figures are in the report, and no row is anywhere but at its site."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from offsite.protos.spec import EXAMS

from .conftest import WORDS

POLICY = 'bases = ["any"]\nheld_out = 12\nmin_held_out = 8\n'
MARK = "w7777"  # a word that no tokenizer knows: where it is found, a row is


def write_rows(folder: Path) -> dict[str, Path]:
    """Write two sites' data, enough to hold some of it out."""
    files = {}
    folder.mkdir()
    for seed, site in enumerate(("north", "south")):
        draw = random.Random(seed)
        lines = []
        for number in range(70):
            start = draw.randrange(60)
            asked = [*WORDS[start : start + 5], f"{MARK}{site}{number}"]
            lines.append({"prompt": " ".join(asked), "completion": " ".join(WORDS[start + 5 : start + 11])})
        files[site] = folder / f"{site}.jsonl"
        files[site].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


@pytest.mark.slow
def test_sites_measure_on_rows_that_stay_theirs(coordinated: Any, tmp_path: Path) -> None:
    for site, file in write_rows(coordinated.folder / "rows").items():
        coordinated.join(site, data=file, policy=POLICY + ('figures = "withhold"\n' if site == "south" else ""))
    spec = coordinated.spec(
        **{"rounds": 2, "sites": ("north", "south"), "min_sites": 2, "evaluate_every": 1},
        evaluation={"owner": str(coordinated.material / "held-out.jsonl")},
    )
    with coordinated.connect() as session:
        run = session.submit(spec)
        run.result(tmp_path / "out")
        report, events = run.report, list(run.watch())
    exam = report["exam"]
    assert exam["sites"].keys() == {"north"}, "the other withholds its figures"
    assert 8 <= exam["sites"]["north"]["rows"] <= 12
    assert exam["overall"]["emulator_tuned"] < exam["overall"]["emulator_zero_shot"]
    assert [(one["round"], one["sites"]) for one in exam["rounds"]] == [(1, 1), (2, 1)]
    assert len(exam["prediction"]["versions"]) == 2 and "gain" in exam["prediction"]["reason"]
    first = report["rounds"][0]["sites"]["north"]
    assert first["held_out_before"] == exam["overall"]["emulator_zero_shot"] > first["held_out_after"]
    (told,) = [event for event in events if event.kind == "exam"]
    score = told.data["exam"]["before"]
    assert (told.site, told.round) == ("north", 2)
    assert math.exp(score["nll"] / score["tokens"]) == pytest.approx(exam["overall"]["emulator_tuned"])
    assert max(event.round for event in events) == 2 < EXAMS
    for place in ("home", "coordinator.log"):
        there = coordinated.folder / place
        for file in [there] if there.is_file() else [file for file in there.rglob("*") if file.is_file()]:
            assert MARK.encode() not in file.read_bytes(), file
