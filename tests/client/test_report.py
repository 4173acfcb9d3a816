"""The report as HTML copes with all figures that a run, or a site that lies, can leave in it."""

from pathlib import Path
from typing import Any

from offsite.client.forgetting import Forgetting, Stage
from offsite.client.report import write

HUGE = {"base_zero_shot": 1e304, "emulator_zero_shot": None, "plug_in": 10**300, "attack": float("nan")}


def report() -> dict[str, Any]:
    told = {"examples": 4, "weight": 1.0, "loss": 1e300, "losses": [1e300, -1e300], "bytes_down": 2**53, "bytes_up": 0}
    spans = [
        {"who": "coordinator", "kind": "building", "start": 1e9, "end": 1e9 + 4},
        {"who": "bank", "kind": "training", "start": 0.0, "end": 1e11},
    ]
    times = dict.fromkeys(("training", "evaluation", "loading", "download", "overhead", "total"), 0.0)
    return {
        "run": "r1",
        "name": "<b>x</b>",
        "base": {"name": "m", "layers": 4, "parameters": 2**53, "digest": "sha256:0"},
        "bundle": {"builders": [{"name": "crash"}], "layers": [0, 3], "disclosed": 0.5, "trainable": [0]},
        **{"method": {"name": "lora"}, "strategy": {"name": "low-rank"}, "training": {"steps": 2}},
        "rounds": [{"round": 1, "sites": {"bank": {**told, "peak_memory_bytes": 2**53, "engine": "x"}}, "figures": {}}],
        **{"warnings": ["w"], "overall": HUGE, "sites": {"bank": HUGE}, "tokens": {"bank": 10**300}},
        "attacks": [{"name": "<i>heal 4", "overall": 1e304}, {"name": "unfreeze 4", "overall": None}],
        "protection": {"label": "not protected", "reason": "r", "margin": None, "lost": 0.25},
        "left_out": [{"round": 1, "site": "lab", "state": "failed", "message": "<script>"}],
        **{"bytes": {"down": 2**53, "up": 0}, "seconds": times, "spans": spans},
    }


def test_a_run_that_went_on_from_others_has_their_tasks(tmp_path: Path) -> None:
    stages = tuple(Stage(f"run-{task}", f"<{task}>", "lora", "mean", "none", 1, 2, 3) for task in "ab")
    losses = ({"<a>": 4.0, "<b>": 3.0}, {"<a>": 2.0, "<b>": 2.5}, {"<a>": 2.25, "<b>": 1.0})
    write(report(), tmp_path / "page.html", stream=Forgetting(stages, losses))
    page = (tmp_path / "page.html").read_text()
    row = '<td>run-b</td><td>&lt;b&gt;</td><td>9.49</td><td class="plug_in">2.72</td>'
    assert "Earlier tasks" in page and row in page and page.count("<svg") == 4
    said = "average +1.625, forgetting +0.250, backward -0.250, forward +0.500"
    assert f"In nats a token: {said}" in page and "intransigence" not in page and "nan" not in page
    write(report(), tmp_path / "gap.html", stream=Forgetting(stages, ({}, {"<a>": 2.0}, losses[2])))
    assert (
        '<td>run-a</td><td>&lt;a&gt;</td><td class="plug_in">7.39</td><td></td>' in (tmp_path / "gap.html").read_text()
    )
    write(report(), tmp_path / "first.html", stream=Forgetting(stages[:1], losses[:2]))
    assert "Earlier tasks" not in (tmp_path / "first.html").read_text(), "there are none"


def test_huge_missing_and_odd_figures_are_drawn_or_left_out(tmp_path: Path) -> None:
    write(report(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "1.0e+304" in page and "lab failed: &lt;script&gt;" in page and "<b>x</b>" not in page
    assert page.count("<svg") == 3 and len(page) < 300_000
    assert "<td>&lt;i&gt;heal 4</td><td>1.0e+304</td>" in page and "there is no margin to tell" in page
    assert "the plug-in loses 0.25 nats against the base tuned itself" in page
    nothing = report() | {"overall": {}, "sites": {}, "tokens": {}, "rounds": [], "spans": []}
    write(nothing, tmp_path / "nothing.html")
    assert "Perplexity on" not in (tmp_path / "nothing.html").read_text()
