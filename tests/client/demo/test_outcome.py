"""What the demo adds to the coordinator's report."""

import math
from typing import Any

import pytest

from offsite.client.demo.outcome import join
from offsite.client.demo.pooled import Pooled
from offsite.protos.figures import Score
from offsite.protos.spec import Span


def scores(**perplexities: float) -> dict[str, Score]:
    return {name: Score(nll=10 * math.log(value), tokens=10) for name, value in perplexities.items()}


def test_the_strongest_attack_is_the_figure_and_all_are_listed() -> None:
    figures = {"base_zero_shot": 16.0, "emulator_zero_shot": 200.0, "emulator_tuned": 50.0, "plug_in": 12.0}
    report: dict[str, Any] = {
        "overall": dict(figures),
        "sites": {"ward": dict(figures), "lab": dict(figures)},
        "spans": [],
        "warnings": [],
        "attacks": [],
    }
    span = Span(kind="training", start=5.0, end=7.0)
    attacks = {"tuned, unfreeze 48": scores(ward=20.0, lab=20.0), "unfreeze 48": scores(ward=10.0, lab=90.0)}
    pooled = {
        "bound": Pooled(scores={"base_tuned": scores(ward=9.0, lab=9.0)}, spans=(span,)),
        "attack": Pooled(scores=attacks, spans=(span,)),
    }
    join(report, pooled, started=0.0)  # type: ignore[arg-type]
    assert report["overall"]["attack"] == pytest.approx(20.0) and report["overall"]["base_tuned"] == pytest.approx(9.0)
    assert report["sites"]["ward"]["attack"] == pytest.approx(20.0), "that attack's everywhere, as the site's own is"
    assert [one["name"] for one in report["attacks"]] == ["tuned, unfreeze 48", "unfreeze 48"]
    assert report["attacks"][1]["overall"] == pytest.approx(30.0)
    assert report["protection"]["margin"] == pytest.approx(math.log(20 / 12))
    assert report["protection"]["lost"] == pytest.approx(math.log(12 / 9))
    assert report["warnings"] == [] and {span["step"] for span in report["spans"]} == {"bound", "attack"}


def test_where_sites_keep_their_rows_the_table_is_of_these_and_the_owners_figures_stand_beside_it() -> None:
    own = {"base_zero_shot": 16.0, "emulator_zero_shot": 200.0, "emulator_tuned": 50.0, "plug_in": 12.0}
    told = {"emulator_zero_shot": 90.0, "emulator_tuned": 60.0}
    exam = {"sites": {"ward": told | {"rows": 16, "tokens": 10}}, "overall": told}
    report: dict[str, Any] = {"overall": own, "sites": {"owner": own}, "tokens": {"owner": 9}, "exam": exam}
    report |= {"spans": [], "warnings": [], "attacks": []}
    both = {"ward": 8.0, "lab": 18.0}
    bound = {"base_zero_shot": scores(**both), "plug_in": scores(**both), "base_tuned": scores(ward=4.0, lab=9.0)}
    attacks = {"tuned, unfreeze 48": scores(ward=20.0, lab=20.0)}
    pooled = {"bound": Pooled(scores=bound, spans=()), "attack": Pooled(scores=attacks, spans=())}
    join(report, pooled, started=0.0)  # type: ignore[arg-type]
    assert report["owner"] == own and report["tokens"] == {"ward": 10, "lab": 10}
    assert report["sites"]["ward"] == {**told, **{name: pytest.approx(v) for name, v in WARD.items()}}
    assert "emulator_tuned" not in report["sites"]["lab"], "it tells nothing"
    assert report["overall"]["plug_in"] == pytest.approx(12.0) and report["overall"]["emulator_tuned"] == 60.0


WARD = {"base_zero_shot": 8.0, "plug_in": 8.0, "base_tuned": 4.0, "attack": 20.0}
