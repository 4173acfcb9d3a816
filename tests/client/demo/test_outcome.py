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
        "bound": Pooled(scores={"bound": scores(ward=9.0, lab=9.0)}, spans=(span,)),
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
