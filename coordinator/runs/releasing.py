"""What a gate holds back of a run, and how the owner lets it out nevertheless."""

import time

from offsite.coordinator.runs.continuing import granted
from offsite.coordinator.runs.ending import outcome
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.results import GATE, LAST, PUBLISH, Release, release
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import Journal
from offsite.protos.documents import to_plain
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.events import Released


def let_out(journal: Journal, run: str, number: int, *, by: str, reason: str) -> None:
    """Publish what a run's gate has held back: the version of a round, or with 0 all of the run.

    From then on it can be fetched, as far as it is among the run's files, and gone on from. Done again, it changes
    nothing. Raises NotFoundError, InputError without a reason or for a round that is not there, and ConflictError where
    the gate has not judged yet, or holds nothing back.
    """
    if not reason.strip():
        raise InputError("a release needs a reason, which stays in the run's audit trail")
    row, history = journal.run(run), History(journal, run)
    if journal.is_live(run) or history.get(GATE) is None:
        raise ConflictError(f"run {run} is {row.state}, and no gate has judged what it gave; nothing is held back")
    if not history[GATE].against:
        raise ConflictError(f"run {run} is not held back: all of its gate holds")
    last = history.rounds(granted(journal, run).rounds)
    if number > last:
        raise InputError(f"run {run} has no round {number}; {run}:{last} is its last")
    files: dict[str, Stored] = {}
    for step, its in ((PUBLISH, outcome(history, last)), (LAST, last)):
        if (published := history.get(step)) and number in (0, its):
            files |= published.artifacts
    value = to_plain(Release(by=by, at=time.time(), reason=reason))
    journal.publish(run, files, release(number).name, value, Released(round=number, by=by, reason=reason))
