"""Events: what one end writes the other reads, and nothing else passes for one."""

from typing import Any

import pytest

from offsite.protos.errors import InputError
from offsite.protos.events import (
    EVENTS,
    Cancelled,
    Completed,
    EmulatorBuilt,
    Event,
    Examined,
    Failed,
    Held,
    Measured,
    Released,
    RoundBegun,
    RoundDone,
    Selected,
    SiteOut,
    SiteState,
    StepBegun,
    StepLost,
    Stopped,
    UpdateAccepted,
    Usage,
    Waiting,
    Warned,
    Withdrawn,
    data,
    read,
)
from offsite.protos.exams import Exam
from offsite.protos.figures import Score

ONE_OF_EACH: list[Event] = [
    Waiting(sites=(), present=("ward",)),
    Selected(sites=("bank", "ward")),
    StepBegun(step="version:0"),
    StepLost(step="version:0", message="killed"),
    EmulatorBuilt(layers=(0, 5), bytes=7, disclosed=0.5, learning_rate=1e-3, computed="fp32"),
    Measured(name="plug_in", sets={"exam": Score(nll=2.5, tokens=3), "odd": Score(nll=None, tokens=1)}),
    Warned(message="look"),
    RoundBegun(round=1, sites=2, joined=("town",)),
    SiteOut(site="bank", by="olga", reason="its update was poison"),
    SiteState(round=1, site="ward", state="training", step=2, steps=4, loss=0.5, bytes_down=9),
    SiteState(round=1, site="ward", state="training", usage=Usage(memory_bytes=9, cpu_s=0.5), lines=("one", "two")),
    SiteState(round=2, site="ward", state="stalled", message="got no further"),
    UpdateAccepted(round=1, site="ward", loss=0.5, bytes=9, examples=3),
    Examined(round=2, site="ward", exam=Exam(rows=3, before=Score(nll=2.5, tokens=3))),
    RoundDone(round=1, sites=1, figures={"residual": 0.0, "odd": None}),
    Stopped(round=4, best=2, message="no better"),
    Held(message="canary"),
    Released(round=2, by="olga", reason="looked at"),
    Withdrawn(round=1, by="olga", reason="it forgot"),
    Completed(),
    Failed(error="why"),
    Cancelled(error="by whom"),
]


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.kind)
def test_an_event_is_read_as_it_was_written_its_round_and_site_beside_its_data(event: Event) -> None:
    plain = data(event)
    beside = {"round": plain.pop("round", 0), "site": plain.pop("site", "")}
    assert read(event.kind, plain, **beside) == event


def test_there_is_an_event_of_each_kind_above() -> None:
    assert {event.kind for event in ONE_OF_EACH} == EVENTS.keys()


def test_what_is_not_known_is_not_told() -> None:
    assert "loss" not in data(SiteState(round=1, site="ward", state="taken"))


@pytest.mark.parametrize(
    ("kind", "plain", "message"),
    [
        ("step", {}, "event step: step"),
        ("step", {"step": 3}, "event step: step"),
        ("warning", {"message": "x", "more": 1}, "event warning: more: there is no such field"),
        ("figure", {"name": "plug_in", "sets": {"exam": {"nll": "0", "tokens": 1}}}, "event figure: sets.exam.nll"),
        ("site", {"state": "taken"}, "event site: round"),
    ],
)
def test_what_is_no_event_is_named(kind: str, plain: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(kind, plain)
