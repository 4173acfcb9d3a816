"""Versions as people see them: what rounds ended in, where that comes from, and what was taken back."""

from collections.abc import Iterator
from dataclasses import dataclass

from offsite.coordinator.runs.continuing import ancestor, granted
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.judging import plugged
from offsite.coordinator.runs.steps.results import fold
from offsite.coordinator.store.journal import Journal, Row
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.events import RoundDone
from offsite.protos.figures import PLUG_IN, perplexity
from offsite.protos.spec import Ancestor


@dataclass(frozen=True)
class Entry:
    """A version."""

    run: str
    round: int  # counted from one
    task: str  # that its run learned
    owner: str
    at: float  # when it was there, in seconds since the epoch
    start: Ancestor | None  # that its run went on from
    figures: dict[str, float]
    sites: tuple[str, ...]  # whose updates are in it
    state: dict[str, str]  # digests of what the owner keeps of it for later rounds, by its name
    digest: str  # of what goes into the base
    withdrawal: Row | None


def lineage(journal: Journal, run: str) -> list[Entry]:
    """Return the versions of a run, after those that it goes on from, oldest first; raises NotFoundError."""
    parts: list[list[Entry]] = []
    at: str | None = run
    last = journal.rounds_done([run]).get(run, 0)
    while at is not None:
        entries = list(_entries(journal, at, range(1, last + 1)))
        parts.append(entries)
        start = granted(journal, at).continues
        at, last = (start.run, start.round) if start else (None, 0)
    return [entry for part in reversed(parts) for entry in part]


def newest(journal: Journal, run: str) -> Entry | None:
    """Return the last version of a run that was not taken back; None if there is none."""
    done, gone = journal.rounds_done([run]).get(run, 0), journal.withdrawn([run])
    left = [at for at in range(1, done + 1) if (run, at) not in gone][-1:]
    return next(_entries(journal, run, left), None)


def _entries(journal: Journal, run: str, rounds: "range | list[int]") -> Iterator[Entry]:
    if not rounds:
        return
    row, history, grant, gone = journal.run(run), History(journal, run), granted(journal, run), journal.withdrawn([run])
    times = {event.round: event.at for event in journal.events(run, kind=RoundDone.kind)}
    for number in rounds:
        folded = history[fold(number)]
        measured = plugged(history, number, last=history.rounds(grant.rounds))
        figures = {PLUG_IN: perplexity(measured.sets.values())} if measured else {}
        known = {name: figure for name, figure in folded.version.figures.items() if figure is not None}
        yield Entry(
            run=run,
            round=number,
            task=grant.task,
            owner=row.owner,
            at=times.get(number, 0.0),
            start=grant.continues,
            figures=figures | known,
            sites=folded.sites,
            state=folded.version.state,
            digest=folded.version.adapter,
            withdrawal=gone.get((run, number)),
        )


def later(journal: Journal, run: str, number: int) -> dict[str, list[int]]:
    """Return what came after a version: rounds by run, of its own and of all that went on from one of these."""
    origins = journal.origins()
    rounds = journal.rounds_done([run, *origins])
    after = {run: list(range(number + 1, rounds.get(run, 0) + 1))}
    grew = True
    while grew:
        grew = False
        for other, (its, round) in origins.items():
            if other not in after and round in after.get(its, ()):
                after[other] = list(range(1, rounds.get(other, 0) + 1))
                grew = True
    return after


def roll_back(journal: Journal, run: str, number: int, *, by: str, reason: str) -> None:
    """Take back all that came after a version.

    Raises NotFoundError, InputError for a version that is not there or was taken back itself, and ConflictError while
    a run works on what would be taken back, also one that was submitted meanwhile.
    """
    if not reason.strip():
        raise InputError("a roll-back needs a reason, which stays with the versions that it takes back")
    ancestor(journal, f"{run}:{number}")
    after = later(journal, run, number)
    if live := sorted(other for other in after if journal.is_live(other)):
        raise ConflictError(
            f"run {live[0]} is not over and works on what came after {run}:{number}; cancel it, or wait for its end"
        )
    journal.withdraw(after, by=by, reason=reason)
