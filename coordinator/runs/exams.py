"""What sites tell of their held-out rows in the course of a run: all of it is in the journal, beside its tasks.

A version of the run, counted from zero as rounds are, is measured by the sites that begin a round with it. The last,
with which none begins, is measured by those that told of the last round: they are asked for nothing else.
"""

from collections.abc import Iterable, Mapping

from offsite.coordinator.store.journal import Journal, Row
from offsite.protos.documents import from_json
from offsite.protos.exams import Exam, nats, total
from offsite.protos.ranges import Name
from offsite.protos.spec import EXAMS, UpdateMetrics

Sheets = dict[int, dict[Name, Exam]]  # by the number of a version, by site


def sheets(tasks: Iterable[Row]) -> Sheets:
    """Return what sites told; of versions of which none did, nothing."""
    told: Sheets = {}
    for task in tasks:
        if exam := _exam(task):
            told.setdefault(task.round - EXAMS if task.round > EXAMS else task.round, {})[task.site] = exam
    return told


def _exam(task: Row) -> Exam | None:
    if not task.metrics:
        return None
    if task.round > EXAMS:
        return from_json(Exam, task.metrics, where="exam")
    return from_json(UpdateMetrics, task.metrics, where="metrics").exam


def loss(journal: Journal, run: str, version: int) -> float | None:
    """Return the sites' loss of a version on their held-out rows, in nats a token, before anybody trains on it.

    It is known once a site has trained from it, so that of version 1 once round 2 has updates, or once the run ends;
    None before, and where no site tells it.
    """
    tasks = [*journal.tasks(run, version), *journal.tasks(run, EXAMS + version)]
    return mean(sheets(tasks).get(version, {}))


def mean(exams: Mapping[Name, Exam], *, trained: bool = False) -> float | None:
    """Return the loss over the rows of all sites, of what they received or of what each of them has trained."""
    scores = [exam.after if trained else exam.before for exam in exams.values()]
    return nats(total(score for score in scores if score is not None))
