"""The report: perplexities over all sets, and what a careful reader would object to."""

import json
import math
from typing import Any

import pytest

from offsite.coordinator.runs.report import perplexities, warnings
from offsite.protos.figures import Score, doubts, marks, protection, title, without_infinities
from offsite.protos.timeline import seconds


def test_over_all_is_over_all_tokens_not_over_sites() -> None:
    overall, sites = perplexities({"plug_in": {"a": Score(nll=30.0, tokens=10), "b": Score(nll=30.0, tokens=30)}})
    assert overall["plug_in"] == pytest.approx(math.exp(60 / 40))
    assert sites["a"]["plug_in"] == pytest.approx(math.exp(3.0)) and sites["b"]["plug_in"] == pytest.approx(math.e)


def test_a_broken_emulator_is_a_large_number_not_a_crash() -> None:
    assert perplexities({"e": {"a": Score(nll=1e9, tokens=10)}})[0]["e"] == math.exp(700)


def test_an_emulator_too_small_to_be_useful_is_a_warning() -> None:
    assert warnings({"base_zero_shot": 10.0, "emulator_zero_shot": 499.0, "plug_in": 9.0}) == []
    (found,) = warnings({"base_zero_shot": 10.0, "emulator_zero_shot": 501.0, "plug_in": 9.0})
    assert "too small to be useful" in found and "50 times" in found and "keep more layers" in found


def test_a_tuning_that_did_not_help_is_a_warning() -> None:
    (found,) = warnings({"base_zero_shot": 10.0, "emulator_zero_shot": 20.0, "plug_in": 10.5})
    assert "did not help" in found


def test_weights_that_are_no_numbers_still_give_a_report_that_is_json() -> None:
    overall, sites = perplexities({"plug_in": {"a": Score(nll=None, tokens=4), "b": Score(nll=1.0, tokens=0)}})
    assert "not a finite perplexity" in warnings(overall)[0]
    told, gone = without_infinities({"overall": overall, "sites": sites, "spans": [{"end": math.inf}], "n": 1})
    assert json.loads(json.dumps(told, allow_nan=False))["overall"] == {"plug_in": None} and told["n"] == 1
    assert gone == ["overall.plug_in", "sites.a.plug_in", "sites.b.plug_in", "spans.0.end"]
    told = protection({"attack": math.nan, "plug_in": 2.0}, ["heal 4"], task=True, tuned_on="notes")
    assert told["label"] == "not protected" and "is no finite number" in told["reason"] and told["margin"] is None


def test_a_site_whose_clock_is_wrong_does_not_change_how_long_a_run_took() -> None:
    spans = [{"kind": "training", "start": 0.0, "end": 1e11}, {"kind": "loading", "start": 5e9, "end": 6e9}]
    split = seconds(spans, start=100.0, end=110.0)
    assert (split["total"], split["training"], split["loading"], split["overhead"]) == (10.0, 10.0, 0.0, 0.0)


HONEST = {
    **{"base_zero_shot": 10.7, "emulator_zero_shot": 160.0, "emulator_tuned": 60.0, "plug_in": 9.0},
    **{"base_tuned": 7.0, "attack": 12.0},
}


@pytest.mark.parametrize(
    ("figure", "value", "why"),
    [
        ("base_tuned", 2970.0, "training made the base itself worse, so this bounds nothing"),
        ("plug_in", 30.0, "it is 3 times the untuned base's"),
        ("emulator_tuned", 170.0, "training made the emulator worse"),
        ("attack", 161.0, "so this attacks nothing"),
        ("emulator_zero_shot", 50_000.0, "guessing among 49,152 tokens does better"),
        ("plug_in", math.nan, "it is no finite number"),
    ],
)
def test_a_figure_that_cannot_be_right_is_marked_and_warned_of(figure: str, value: float, why: str) -> None:
    assert doubts(HONEST, vocabulary=49_152) == {} == marks({"overall": HONEST, "sites": {"a": HONEST}})
    row = HONEST | {figure: value}
    found = marks({"overall": HONEST, "sites": {"a": row}, "vocabulary": 49_152})
    assert found.keys() == {"sites.a"} and list(found["sites.a"]) == [figure] and why in found["sites.a"][figure]
    told = warnings(row, vocabulary=49_152)
    assert any("cannot be right" in one or "finite" in one for one in told)
    assert not [one for one in warnings(HONEST, vocabulary=49_152) if "cannot be right" in one]


@pytest.mark.parametrize(
    ("changes", "figure", "what"),
    [
        ({"emulator_tuned": 9.1, "attack": 9.05}, "emulator_tuned", "as good as the plug-in: nothing is protected"),
        ({"plug_in": 6.0}, "base_tuned", "the plug-in is better, so this is no bound"),
        ({"attack": 70.0}, "attack", "the emulator tuned as asked is better, so this attack tells nothing"),
        ({"emulator_zero_shot": 10.0, "emulator_tuned": 9.9}, "emulator_zero_shot", "the base is worse"),
    ],
)
def test_a_figure_that_is_not_what_it_is_called_is_called_what_it_is(changes: Any, figure: str, what: str) -> None:
    row = HONEST | {"attack": 9.5} | changes
    marked = marks({"overall": row, "sites": {}})["overall"]
    assert list(marked) == [figure] and what in marked[figure]
    (warning,) = warnings(row)
    assert warning.startswith(f"the figure '{title(figure)}' is not what it is called: ") and what in warning


def test_nothing_is_said_of_an_emulator_that_is_the_base() -> None:
    federated = {"base_zero_shot": 10.0, "emulator_zero_shot": 10.0, "emulator_tuned": 7.0, "plug_in": 7.0}
    assert marks({"overall": federated | {"base_tuned": 7.0}, "sites": {}}) == {}


def test_where_no_attack_was_asked_for_the_report_says_so_and_claims_nothing() -> None:
    told = protection({"plug_in": 9.0, "emulator_tuned": 60.0}, task=False, tuned_on="notes")
    assert told == {
        "label": "not protected",
        "margin": None,
        "lost": None,
        "reason": "no attack on the emulator was asked for, so none was measured; what tuning the base itself gives "
        "was not measured",
    }


def test_the_strongest_attack_stands_beside_what_the_plug_in_loses() -> None:
    told = protection(HONEST, ["heal 8, unfreeze 16", "heal 8"], task=True, tuned_on="notes")
    assert told["margin"] == pytest.approx(math.log(12 / 9)) and told["lost"] == pytest.approx(math.log(9 / 7))
    assert told["reason"] == (
        "no threshold was stated; the strongest of 2 attacks (heal 8, unfreeze 16) brings the emulator to perplexity "
        "12.00, 0.29 nats behind the plug-in; the plug-in is 0.25 nats behind the base itself tuned on notes"
    )
    better = protection(HONEST | {"attack": 8.0}, ["unfreeze 4"], task=True, tuned_on="notes")
    assert better["margin"] < 0 and better["reason"].startswith(
        "no threshold was stated; the one attack that was made (unfreeze 4) brings the emulator to perplexity 8.00, "
        "0.12 nats ahead of the plug-in"
    )


def test_an_attack_that_does_not_reach_the_tuned_emulator_is_not_the_margin() -> None:
    told = protection(HONEST | {"attack": 70.0}, ["heal 4"], task=False, tuned_on="notes")
    assert told["margin"] == pytest.approx(math.log(60 / 9))
    assert "the emulator tuned as asked is stronger than that, 1.90 nats behind the plug-in" in told["reason"]
    assert "there was public text alone, and a site, which has the task's, may come further" in told["reason"]
