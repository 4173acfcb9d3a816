"""What follows from measured rows, made by hand: protection, warnings, the frontier, the recommendation."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from offsite.coordinator.comparison.rows import (
    FIVE,
    Attacked,
    Candidate,
    ClientStep,
    Comparison,
    Emulated,
    Measured,
    Predicted,
    Row,
    Score,
)
from offsite.coordinator.comparison.table import next_step, table
from offsite.coordinator.comparison.verdict import frontier, judged, recommend
from offsite.protos.recipes import parse, parse_one

BASE = 32.0


def score(held_out: float, general: float = 20.0) -> Score:
    def predicted(perplexity: float) -> Predicted:
        return Predicted(nll=100 * math.log(perplexity), tokens=100, perplexity=perplexity)

    return Score(held_out=predicted(held_out), general=predicted(general))


def attacked(found: Score, **how: Any) -> Attacked:
    return Attacked(**{"start": "emulator", "healing": 0, "steps": 0} | how, score=found)


def row(
    number: int,
    *,
    plug_in: float = 27.0,
    zero_shot: float = 300.0,
    unfreeze: float = 30.0,
    heal: float = 60.0,
    tuned: float = 100.0,
    tuned_unfreeze: float = 999.0,
    general: float = 40.0,
    bound: float = 23.0,
    megabytes: int = 100,
    verbatim: int = 80,
    flops: int = 10,
) -> Row:
    figures = dict(zip(FIVE, (BASE, zero_shot, tuned, plug_in, bound), strict=True))
    measured = Measured(
        emulated=Emulated(
            layers=(0, 1, 3),
            trained=(0, 3),
            zero_shot=score(zero_shot),
            attacks=(attacked(score(unfreeze, general), steps=4), attacked(score(heal, general), healing=8)),
            verbatim=verbatim,
            lossy=0,
            parameters=100,
            bytes=megabytes * 10**6,
        ),
        figures={name: score(value, 400.0 if "emulator" in name else 20.0) for name, value in figures.items()},
        attacks=(attacked(score(tuned_unfreeze, general), start="tuned", steps=4),),
        client=ClientStep(flops=flops, peak_bytes=50, cpu_s=0.1),
        full=ClientStep(flops=20, peak_bytes=100, cpu_s=0.2),
        seconds=1.0,
    )
    candidate = Candidate(
        builders=parse(f"crash(keep={number})"),
        trainable=parse_one("ends"),
        method=parse_one("lora(modules=[q_proj,v_proj])"),
    )
    return Row(number=number, label=f"crash(keep={number})[b]", candidate=candidate, measured=measured)


def judge(*rows: Row, protected_from: float | None = None) -> list[Row]:
    return [judged(one, protected_from=protected_from) for one in rows]


def report(*rows: Row, protected_from: float | None = None) -> Comparison:
    found = judge(*rows, protected_from=protected_from)
    number, reason = recommend(found, protected_from=protected_from)
    best = frontier(found)
    return Comparison(
        model="base",
        base={},
        settings={"protected_from": protected_from, "calibration": "task.jsonl"},
        public="public.jsonl",
        rows=tuple(replace(one, frontier=one.number in best) for one in found),
        recommended=number,
        reason=reason,
    )


def test_the_margin_is_that_of_the_best_attack_on_either_text() -> None:
    near_task, near_base = judge(row(1, plug_in=27.0, unfreeze=30.0), row(2, unfreeze=90.0, heal=80.0, general=21.0))
    assert near_task.protection and near_task.protection.margin == pytest.approx(math.log(30 / 27))
    assert near_base.protection and near_base.protection.margin == pytest.approx(math.log(21 / 20))


def test_the_strongest_of_all_attacks_counts_wherever_it_began() -> None:
    (found,) = judge(row(1, plug_in=27.0, unfreeze=40.0, tuned_unfreeze=30.0, heal=50.0, bound=23.0))
    assert found.measured and found.protection
    assert found.protection.margin == pytest.approx(math.log(30 / 27))
    assert "'tuned, unfreeze 4' comes within 0.11 nats of the plug-in" in found.protection.reason
    assert {kind: one.name for kind, one in found.measured.strongest.items()} == {
        "unfreeze": "tuned, unfreeze 4",
        "heal": "heal 8",
    }
    assert found.measured.lost == pytest.approx(math.log(27 / 23))


def test_an_attack_that_does_harm_is_given_up() -> None:
    found = judge(row(1, unfreeze=900.0, heal=900.0, tuned=33.0), row(2, unfreeze=900.0, heal=900.0, zero_shot=28.0))
    (tuned, untouched) = (one.protection for one in found)
    assert tuned and tuned.margin == pytest.approx(math.log(33 / 27)) and "'tune it as asked'" in tuned.reason
    assert untouched and untouched.margin == pytest.approx(math.log(28 / 27))
    assert "'leave it as it is' comes within 0.04 nats of the plug-in" in untouched.reason


def test_protected_is_what_keeps_a_stated_threshold_and_nothing_without_one() -> None:
    labels = [
        one.protection.label
        for threshold in (None, 0.1, 0.11)
        for one in judge(row(1, plug_in=27.0, unfreeze=30.0), protected_from=threshold)
        if one.protection
    ]
    assert labels == ["not protected", "protected", "not protected"]  # ln(30/27) is 0.105


def test_an_emulator_too_small_and_a_plug_in_that_does_not_help_are_warned_of() -> None:
    small, worse, fine = judge(row(1, zero_shot=50 * BASE + 1), row(2, plug_in=BASE), row(3))
    assert "too small to be useful" in small.warnings[0] and "did not help" in worse.warnings[0]
    assert not fine.warnings


def test_the_frontier_has_who_is_best_in_something_and_nobody_who_is_dominated() -> None:
    rows = judge(
        row(1, plug_in=26.0),
        row(2, megabytes=50),
        row(3),  # dominated by 2
        row(4, flops=5),
        row(5, megabytes=50),  # the equal of 2
        row(6, megabytes=1, zero_shot=1e6),  # small and useless
        row(7, verbatim=10, megabytes=200),
    )
    assert frontier(rows) == {1, 2, 4, 5, 7}


def test_the_best_plug_in_is_recommended_where_it_is_clearly_the_best() -> None:
    found = report(row(1, plug_in=26.0, megabytes=200), row(2, plug_in=27.0, megabytes=50))
    assert found.recommended == 1 and "the best plug-in, by more than 2%" in found.reason


def test_among_plug_ins_as_good_fewer_bytes_are_recommended_then_less_disclosure() -> None:
    found = report(
        row(1, plug_in=26.0, megabytes=200),
        row(2, plug_in=26.5, megabytes=50, verbatim=60),
        row(3, plug_in=26.4, megabytes=50),
    )
    assert found.recommended == 2 and "3 have a plug-in within 2% of the best (26.00)" in found.reason
    assert "fewest bytes to download (50.0 MB)" in found.reason and "no threshold was stated" in found.reason


def test_with_a_threshold_only_who_is_protected_can_be_recommended() -> None:
    weak, strong = row(1, plug_in=26.0, unfreeze=27.0), row(2, plug_in=30.0, unfreeze=60.0)
    assert report(weak, strong).recommended == 1
    found = report(weak, strong, protected_from=0.3)
    assert found.recommended == 2 and "It is the only candidate" in found.reason and "0.3 nats" in found.reason


def test_where_none_is_protected_none_is_recommended_and_it_is_said_what_would_have_to_change() -> None:
    found = report(row(1, unfreeze=25.0), row(2, unfreeze=30.0), protected_from=0.3)
    assert found.recommended is None and next_step(found) == ""
    assert "the largest margin over the attacks is 0.11 (number 2)" in found.reason and "give away less" in found.reason


def test_what_rests_on_figures_that_cannot_be_right_is_not_recommended() -> None:
    found = report(row(1, plug_in=20.0, bound=2970.0), row(2, plug_in=27.0))
    assert found.recommended == 2 and "bounds nothing" in found.rows[0].warnings[0]
    assert report(row(1, bound=2970.0)).recommended is None


def test_where_none_is_useful_none_is_recommended() -> None:
    found = report(row(1, plug_in=BASE + 1), row(2, zero_shot=1e5))
    assert found.recommended is None and "add distilled to the chain" in found.reason
    assert report(Row(number=1, label="x", candidate=row(1).candidate, fault="f")).recommended is None


def test_the_table_shows_every_row_what_is_wrong_and_what_to_do() -> None:
    failed = Row(number=3, label="loram", candidate=row(3).candidate, fault="it did not fit")
    found = report(row(1), row(2, zero_shot=1e5), failed)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(found))
    text = " ".join(console.export_text().split())
    assert (
        "crash(keep=2)[b]" in text and "2: the emulator is too small" in text and "3: not measured: it did not" in text
    )
    assert "Next: offsite emulator build base --builder 'crash(keep=1)' --trainable ends --public public.jsonl" in text
    assert "--calibration task.jsonl --out bundle" in text
