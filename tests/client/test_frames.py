"""A report as frames."""

import math

import pytest

from offsite.client import frames
from offsite.client.report import plot

from .test_report import report


def test_a_report_is_read_as_frames() -> None:
    figures = {"base_zero_shot": 20.5, "plug_in": 11.25, "attack": None}
    told = report() | {"overall": figures, "sites": {"bank": figures | {"plug_in": None}}}
    table = frames.figures(told)
    assert list(table.columns) == ["base_zero_shot", "plug_in"] and list(table.index) == ["bank", "overall"]
    assert table.loc["overall", "plug_in"] == 11.25 and math.isnan(table.loc["bank", "plug_in"])
    given = frames.rounds(told)
    assert given.loc[(1, "bank"), "examples"] == 4 and "losses" not in given
    assert list(frames.steps(told)["bank"]) == [1e300, -1e300]
    spans = frames.spans(told)
    assert list(spans["who"]) == ["bank", "coordinator"] and spans["start"].iloc[0] == 0
    assert spans["start"].iloc[1] == pytest.approx(1e9)


def test_of_nothing_there_are_empty_frames_and_plots() -> None:
    nothing = report() | {"overall": {}, "sites": {}, "tokens": {}, "rounds": [], "spans": []}
    assert frames.figures(nothing).empty and frames.rounds(nothing).empty and frames.steps(nothing).empty
    assert frames.spans(nothing).empty
    assert {len(plot(kind, nothing).axes) for kind in ("figures", "losses", "times")} == {1}


def test_what_sites_hold_out_is_a_frame() -> None:
    site = {"rows": 16, "tokens": 90, "noised": False, "emulator_zero_shot": 159.1}
    told = frames.held_out(report() | {"exam": {"sites": {"bank": site}}})
    assert told.loc["bank", "rows"] == 16 and told.index.name == "site"
    assert frames.held_out(report() | {"exam": None}).empty
