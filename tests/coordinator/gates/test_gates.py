"""Checks as functions of what was measured, and the step that measures it."""

import math
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.gates import Evidence
from offsite.coordinator.gates.canary import Canary
from offsite.coordinator.gates.licence import Licence, stated
from offsite.coordinator.gates.losses import Figure, General
from offsite.coordinator.gates.refusal import Refusal
from offsite.protos.figures import Score


def scores(*losses: float) -> list[Score]:
    return [Score(nll=loss, tokens=1) for loss in losses]


@pytest.mark.parametrize(
    ("check", "figures", "holds"),
    [
        (Figure(), {"base_zero_shot": 10.0, "plug_in": 10.0}, True),
        (Figure(), {"base_zero_shot": 10.0, "plug_in": 10.1}, False),
        (Figure(gain=-0.1), {"base_zero_shot": 10.0, "plug_in": 10.1}, True),
        (Figure(most=9.0), {"base_zero_shot": 10.0, "plug_in": 9.5}, False),
        (Figure(), {"base_zero_shot": 10.0, "plug_in": math.nan}, False),
        (Figure(), {}, False),
    ],
)
def test_the_plug_in_is_held_to_a_bound_and_to_the_base(check: Figure, figures: Any, holds: bool) -> None:
    assert check.judge(Evidence(figures=figures)).holds is holds


def test_what_was_lost_on_public_text_is_bounded_in_nats() -> None:
    evidence = Evidence(base={"wiki": scores(2.0, 2.0)}, plug_in={"wiki": scores(2.1, 2.1)})
    assert General(probe="wiki", most=0.11).judge(evidence).holds
    finding = General(probe="wiki").judge(evidence)
    assert not finding.holds and "+0.100 nats a token from the base's; at most +0.05" in finding.reason
    broken = Evidence(base={"wiki": scores(2.0)}, plug_in={"wiki": [Score(nll=None, tokens=1)]})
    assert not General(probe="wiki", most=9.0).judge(broken).holds, "no number is no pass"


def test_a_canary_that_gained_more_than_all_others_is_exposed() -> None:
    base = {"planted": scores(9.0, 9.0), "others": scores(*[9.0] * 63)}
    others = scores(*(8.0 - at / 100 for at in range(63)))
    check = Canary(planted="planted", others="others")
    leaks = check.judge(Evidence(base=base, plug_in={"planted": scores(1.0, 9.0), "others": others}))
    assert not leaks.holds and "the most exposed one shows 6.0 of 6.0 bits" in leaks.reason
    quiet = check.judge(Evidence(base=base, plug_in={"planted": scores(7.7, 9.0), "others": others}))
    assert quiet.holds, quiet.reason
    with pytest.raises(ValueError, match="give more than 32, or allow less"):
        check.judge(Evidence(base={name: scores(1.0) for name in base}, plug_in={name: scores(1.0) for name in base}))


def test_refusals_are_held_to_a_share_by_their_mean_over_tokens() -> None:
    long = [Score(nll=8.0, tokens=10), Score(nll=2.0, tokens=1)]  # the refusal is longer, and likelier by token
    evidence = Evidence(base={"harm": long}, plug_in={"harm": [*long, *scores(2.0, 1.0)]})
    assert Refusal(probe="harm", least=0.5).judge(evidence).holds
    finding = Refusal(probe="harm").judge(evidence)
    assert not finding.holds and "likelier at 50% of the prompts of harm, the base at 100%" in finding.reason


def test_a_licence_is_what_the_bases_card_states(tmp_path: Path) -> None:
    assert stated(tmp_path) == "" and not Licence().judge(Evidence()).holds
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    evidence = Evidence(licence=stated(tmp_path))
    assert Licence().judge(evidence).holds and Licence(allowed=("apache-2.0",)).judge(evidence).holds
    assert not Licence(allowed=("mit",)).judge(evidence).holds
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert stated(tmp_path) == ""
