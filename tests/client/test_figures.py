import io
import re
from typing import Any

from rich.console import Console

from offsite.client.figures import table
from offsite.protos.figures import FIGURES


def test_a_report_of_large_figures_and_a_long_name_is_whole_in_80_columns() -> None:
    row = dict.fromkeys(FIGURES, 31415.9)
    report: dict[str, Any] = {
        "sites": {"helpdesk": row},
        "overall": row | {"attack": None},  # as where nothing was attacked
        "tokens": {"helpdesk": 12345},
        "warnings": ["the emulator is too small"],
        "attacks": [{"name": "heal 96, unfreeze 192", "overall": 18.6}, {"name": "heal 96", "overall": None}],
        "protection": {"label": "not protected", "reason": "no threshold was stated"},
        "bytes": {"down": 2e6, "up": 1e6},
        "seconds": {"total": 10, "training": 6, "evaluation": 2, "loading": 1, "download": 0, "overhead": 1},
    }
    told = io.StringIO()
    Console(file=told, width=80).print(table(report))
    text = told.getvalue()
    assert "…" not in text and text.count("31,416") == 2 * len(FIGURES) - 1
    assert all(word in text for figure in FIGURES.values() for word in figure.head.split("\n"))
    assert "attack: heal 96, unfreeze 192: perplexity 18.60\nattack: heal 96: perplexity not finite" in re.sub(
        " +\n", "\n", text
    )
    assert "warning: the emulator is too small" in text and "not protected: no threshold was stated" in text
    assert "2.0 MB down" in text and "overhead 1 = 10%" in text


def test_a_run_that_goes_on_from_another_one_says_so() -> None:
    report = EMPTY | {"continues": {"run": "ab12", "round": 2, "rounds": 5}}
    assert "goes on from round 2 of run ab12 (5 rounds led to it)" in told(report)
    assert "goes on from" not in told(EMPTY | {"continues": None})


def told(report: dict[str, Any]) -> str:
    screen = io.StringIO()
    Console(file=screen, width=80).print(table(report))
    return screen.getvalue()


EMPTY: dict[str, Any] = {
    **{"sites": {}, "overall": {}, "tokens": {}, "warnings": [], "bytes": {"down": 0, "up": 0}},
    "attacks": [],
    "protection": {"label": "not protected", "reason": "no attack on the emulator was measured"},
    "seconds": dict.fromkeys(("total", "training", "evaluation", "loading", "download", "overhead"), 0.0),
}


def test_a_run_without_figures_has_no_table_of_them() -> None:
    text = told(EMPTY)
    assert "no figures" in text and "zero-shot" not in text and "tokens" not in text
    assert "(overhead 0)" in text, "no comma before the first, no division by nothing"


def test_who_is_missing_from_which_round_is_said() -> None:
    left = {"round": 2, "site": "bank", "state": "failed", "message": "the trainer was killed \x1b[31m"}
    assert "round 2 without bank: failed: the trainer was killed" in told(EMPTY | {"left_out": [left]})
    assert "\x1b" not in told(EMPTY | {"left_out": [left]})
    assert "and 60 more" in told(EMPTY | {"left_out": [left] * 100})


def test_figures_that_are_huge_or_no_numbers_fit_too() -> None:
    row = {"base_zero_shot": 1e304, "plug_in": None, "attack": float("inf"), "emulator_tuned": "x"}
    report = EMPTY | {"sites": {"a": row}, "overall": row, "tokens": {"a": 3}, "not_finite": ["overall.plug_in"]}
    text = told(report)
    assert "1.0e+304" in text and text.count("finite") == 3


def test_a_figure_that_cannot_be_right_is_marked_and_explained() -> None:
    row = {"base_zero_shot": 10.7, "base_tuned": 2970.0}
    why = {"base_tuned": "training made the base itself worse, so this bounds nothing"}
    report = EMPTY | {"sites": {"a": row}, "overall": row, "tokens": {"a": 3}, "marks": {"sites.a": why}}
    text = " ".join(told(report).split())
    assert text.count("2,970!") == 1 and "! a, base tuned: training made the base itself worse" in text


EXAM: dict[str, Any] = {
    "sites": {
        "bank": {"rows": 16, "tokens": 90, "noised": False, "emulator_zero_shot": 159.1, "emulator_tuned": 85.38},
        "ward": {"rows": 1200, "tokens": 1200, "noised": True, "emulator_zero_shot": 40.0},
    },
    "overall": {"emulator_zero_shot": 159.1, "emulator_tuned": 85.38},
    "prediction": {"reason": "after round 2 both gain"},
}


def test_what_sites_hold_out_has_a_table_of_its_own_with_or_without_the_owners() -> None:
    text = told(EMPTY | {"exam": EXAM})
    assert "rows that never left their sites" in text and "ward, with noise" in text and "85.38" in text
    assert "1,200" in text and "after round 2 both gain" in text
    assert "never left" not in told(EMPTY | {"exam": None})


def test_where_the_rows_are_the_sites_the_owners_figures_are_a_line() -> None:
    row = dict.fromkeys(FIGURES, 20.5)
    own = {"base_zero_shot": 30.25, "plug_in": 28.5}
    report = EMPTY | {"sites": {"bank": row}, "overall": row, "tokens": {"bank": 3}, "exam": EXAM, "owner": own}
    text = told(report)
    assert "on the owner's own text: base zero-shot 30.25, plug-in 28.50" in text
    assert "never left" not in text and "after round 2 both gain" in text
