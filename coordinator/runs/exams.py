"""What sites tell of their held-out rows in the course of a run, read from its tasks: the journal has all of it.

A version of the run, counted from zero as rounds are, is measured by the sites that begin a round with it; the last one
by sites that are asked for nothing else (`FINAL`).
"""

from collections.abc import Iterable, Mapping

from offsite.coordinator.store.journal import Journal, Row
from offsite.protos.documents import from_json
from offsite.protos.exams import Exam, nats, total
from offsite.protos.ranges import Name
from offsite.protos.spec import UpdateMetrics

Sheets = dict[int, dict[Name, Exam]]  # by the round that began with a version, by site


def sheets(tasks: Iterable[Row]) -> Sheets:
    """Return what sites told; of rounds in which none did, nothing."""
    told: Sheets = {}
    for task in tasks:
        if task.metrics and (exam := from_json(UpdateMetrics, task.metrics, where="metrics").exam):
            told.setdefault(task.round, {})[task.site] = exam
    return told


def loss(journal: Journal, run: str, version: int) -> float | None:
    """Return the sites' loss of a version on their held-out rows, in nats a token, before anybody trains on it.

    It is known once a site has trained from it, so that of version 1 once round 2 has updates; None before, and where
    no site tells it.
    """
    return mean(sheets(journal.tasks(run, version)).get(version, {}))


def mean(exams: Mapping[Name, Exam], *, trained: bool = False) -> float | None:
    """Return the loss over the rows of all sites, of what they received or of what each of them has trained."""
    scores = [exam.after if trained else exam.before for exam in exams.values()]
    return nats(total(score for score in scores if score is not None))
