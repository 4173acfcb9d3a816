"""The steps of a run as documents, as the journal has them."""

import math
from pathlib import Path

import pytest

from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.results import Evaluation, evaluate, fold
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal
from offsite.protos.chunks import digest_bytes
from offsite.protos.errors import InputError
from offsite.protos.events import Measured
from offsite.protos.figures import Score
from offsite.protos.spec import Span

DIGEST = digest_bytes(b"anything")
SPAN = {"kind": "evaluation", "start": 1.0, "end": 2.0}
FOLDED = {  # with what is no number as it was computed
    "version": {
        "adapter": DIGEST,
        "broadcast": {"r4": {"digest": DIGEST, "size": 3}},
        "state": {"residual.r4": DIGEST},
        "figures": {"factor_mean_error": math.nan},
    },
    "lineage": {"ward": {"update": DIGEST, "weight": 1.0}},
    "spans": [SPAN],
}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = open_journal(f"sqlite://{tmp_path}/journal.db")
    journal.add_run("r", token="t", owner="alice", spec=b"{}")
    return journal


def test_a_step_is_read_as_a_document(journal: Journal) -> None:
    journal.add_step("r", "version:1", FOLDED)
    history = History(journal, "r")
    folded = history[fold(1)]
    assert folded.version.broadcast["r4"].size == 3 and folded.lineage["ward"].weight == 1.0
    assert folded.left_out == {} and folded.version.figures == {"factor_mean_error": None}
    assert list(history.spans()) == [("version:1", Span(kind="evaluation", start=1.0, end=2.0))]


def test_the_first_result_stands_and_only_it_is_told(journal: Journal) -> None:
    step = evaluate("plug_in")
    first, second = (Evaluation(sets={"exam": Score(nll=nll, tokens=3)}) for nll in (1.0, 2.0))
    early, late = History(journal, "r"), History(journal, "r")
    assert early.get(step) is None
    for history, result in ((early, first), (late, second)):
        assert history.record(step, result, Measured(name="plug_in", sets=result.sets)) == first
    assert [event.data["sets"]["exam"]["nll"] for event in journal.events("r")] == [1.0]


def test_a_step_of_another_version_is_named(journal: Journal) -> None:
    journal.add_step("r", "plug_in", {"sets": {"exam": 3}})
    with pytest.raises(InputError, match="step plug_in of run r: sets.exam"):
        History(journal, "r")[evaluate("plug_in")]
