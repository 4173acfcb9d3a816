"""Which blobs a backup holds: those that its journal names."""

from typing import Any

from offsite.coordinator.retention import goes_on_from, worked_with
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.journal import LIVE, Journal
from offsite.protos.chunks import is_digest

FILES = "files"  # of a backup's folder
HASHES = ("base", "method_hash")  # what in the journal has a digest that is no blob's


def named(journal: Journal, blobs: Blobs) -> tuple[set[str], set[str]]:
    """Return the blobs that a journal's runs need, and what else of theirs may still be there.

    Needed are published files and, of a run that is not over, all that it goes on with. Manifests are read where they
    are among the blobs given. Raises MismatchError for one that has changed there.
    """
    needed: set[str] = set()
    useful: set[str] = set()
    for run in journal.runs():
        needed |= {file.digest for file in journal.artifacts(run.id)}
        works = worked_with(journal, blobs, run.id)
        if works.lost:
            raise works.lost[0]
        useful |= works.digests
        if run.state in LIVE:
            needed |= {task.update for task in journal.tasks(run.id) if task.update}
            needed |= _digests(journal.steps(run.id)) | goes_on_from(journal, run.id)
    return needed, useful - needed


def _digests(value: Any) -> set[str]:
    """Return the digests of blobs in what steps gave."""
    if isinstance(value, dict):
        return set().union(*(_digests(one) for name, one in value.items() if name not in HASHES))
    if isinstance(value, list):
        return set().union(*map(_digests, value))
    return {value} if isinstance(value, str) and is_digest(value) else set()
