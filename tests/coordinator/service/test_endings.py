"""How tasks end without an update: what is kept of it, and what is told."""

from typing import Any

import pytest

from offsite.coordinator.service.fleet import _ended
from offsite.protos import fleet_pb2 as pb
from offsite.protos.documents import to_json
from offsite.protos.errors import InputError
from offsite.protos.events import Examined, SiteState
from offsite.protos.exams import Exam
from offsite.protos.figures import Score
from offsite.protos.spec import EXAMS, Choice, LocalTraining, TaskSpec

DIGEST = "sha256:" + "0" * 64
EXAM = Exam(rows=12, before=Score(nll=30.0, tokens=10))
NAMES = ("base", "manifest", "adapter", "method_hash")
TASK: dict[str, Any] = {
    **{"run": "r", "rounds": 2, "site": "bank", "attempt": 0, "method": Choice(name="lora")},
    **dict.fromkeys(NAMES, DIGEST),
    **dict.fromkeys(("manifest_size", "adapter_size", "update_size"), 1),
    "training": LocalTraining(learning_rate=0.1),
}


def ended(round: int, state: "pb.TaskState", exam: str = "") -> Any:
    name = pb.TaskState.Name(state).lower()
    request = pb.ReportRequest(state=state, exam=exam)
    return _ended(request, TaskSpec(round=round, **TASK), {"state": name, "message": ""})


def test_what_an_exam_gives_is_kept_and_told_of_its_version() -> None:
    values, event = ended(EXAMS + 2, pb.MEASURED, to_json(EXAM).decode())
    assert values == {"state": "measured", "message": "", "metrics": to_json(EXAM).decode()}
    assert event == Examined(round=2, site="bank", exam=EXAM)


@pytest.mark.parametrize("state", [pb.MEASURED, pb.REFUSED, pb.FAILED])
def test_of_an_exam_that_gives_nothing_nothing_is_told(state: "pb.TaskState") -> None:
    values, event = ended(EXAMS + 2, state)
    assert event is None and "metrics" not in values


def test_only_an_exam_is_measured_and_only_by_an_exam() -> None:
    assert ended(1, pb.FAILED)[1] == SiteState(round=2, site="bank", state="failed")
    with pytest.raises(InputError, match="the task is to train"):
        ended(1, pb.MEASURED, to_json(EXAM).decode())
    with pytest.raises(InputError, match="report: exam"):
        ended(EXAMS + 1, pb.MEASURED, '{"rows": 0}')
