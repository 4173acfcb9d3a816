"""What is kept of runs that are over, and the collection of the rest; safe while a coordinator works on others.

A run's row, report and events stay. Its published files stay until a policy says otherwise; what it worked with (its
bundles, broadcasts, updates and averages) goes some days after its end. A run that is not over keeps everything.
A manifest that is lost keeps nobody from the rest: what it may have named stays.
"""

import json
import time
from dataclasses import dataclass, field

from offsite.coordinator.home import Home
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.gateways import OLD_S, mark
from offsite.coordinator.store.journal import LIVE, Journal, Row
from offsite.protos.chunks import DIGEST, digest_bytes
from offsite.protos.errors import MismatchError, NotFoundError, OffsiteError

DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class Retention:
    """What is kept of runs that are over."""

    keep_runs: int | None = None  # the newest runs whose published files are kept; None: of all
    keep_days: float | None = None  # since its end, for which a run's published files are kept; None: for ever
    working_days: float = 7.0  # since its end, for which what a run worked with is kept
    most_events: int = 10_000  # of a run; of more, the oldest that only tell a training step go


@dataclass(frozen=True)
class Freed:
    """What was removed, or would be."""

    files: int
    bytes: int
    runs: tuple[str, ...]  # whose published files are forgotten
    events: int
    lost: tuple[str, ...] = ()  # of each manifest that cannot be read, whose it is and why

    def __str__(self) -> str:
        """Say it in a line."""
        runs = f", the published files of {len(self.runs)} runs among them" if self.runs else ""
        return f"{self.files} files, {self.bytes / 1e6:.1f} MB{runs}, and {self.events} events"


@dataclass
class Needed:
    """What a run works with, by digest."""

    digests: set[str]
    lost: list[OffsiteError] = field(default_factory=list)  # why manifests that it names could not be read
    known: bool = True  # whether the digests are all, though manifests were lost


def collect(home: Home, retention: Retention, *, dry_run: bool = False) -> Freed:
    """Remove what need not be kept; raises OffsiteError."""
    journal, blobs, now = home.journal(), home.blobs(), time.time()
    lost: list[str] = []
    try:
        runs = journal.runs()
        over = [run for run in reversed(runs) if run.state not in LIVE]
        live = len(over) < len(runs)
        before = now - DAY_S if live else now
        forgotten = [run for at, run in enumerate(over) if not _published_is_kept(run, at, retention, now)]
        unpublished = {run.id for run in forgotten}
        keep = {digest_bytes(mark(gateway.name)) for gateway in journal.gateways(within_s=OLD_S)}
        for run in runs:
            if run.state in LIVE:
                keep |= goes_on_from(journal, run.id)
            recent = run.id not in unpublished and now - run.finished_at < retention.working_days * DAY_S
            if run.state in LIVE or recent:
                needed = worked_with(journal, blobs, run.id, live=run.state in LIVE)
                keep |= needed.digests
                lost += [f"run {run.id}: {why}" for why in needed.lost]
                if not needed.known:  # what it works with was stored, or stored again, after it was submitted
                    before = min(before, run.submitted_at - DAY_S)
            if run.id not in unpublished:
                keep |= {file.digest for file in journal.artifacts(run.id)}
        named = tuple(run.id for run in forgotten if journal.artifacts(run.id))
        events = sum(journal.thin(run.id, most=retention.most_events, dry_run=dry_run) for run in runs)
        if not dry_run:
            for run in named:
                journal.forget_artifacts(run)
        # A step stores its files before the journal names them: while one may be at work, the young ones stay.
        files, size = blobs.sweep(keep, before=before, dry_run=dry_run)
        if not dry_run and not live:
            home.sweep()
        return Freed(files=files, bytes=size, runs=named, events=events, lost=tuple(lost))
    finally:
        journal.close()


def _published_is_kept(run: Row, newer: int, retention: Retention, now: float) -> bool:
    old = retention.keep_days is not None and now - run.finished_at > retention.keep_days * DAY_S
    beyond = retention.keep_runs is not None and newer >= retention.keep_runs
    return not (old or beyond)


def goes_on_from(journal: Journal, run: str) -> set[str]:
    """Return every digest of the version that a run goes on from; until it has begun, no step of its own names them."""
    if not (continues := journal.steps(run).get("granted", {}).get("continues")):
        return set()
    folded = journal.steps(continues["run"]).get(f"version:{continues['round']}", {})
    return _named(json.dumps(folded.get("version", {})))


def worked_with(journal: Journal, blobs: Blobs, run: str, *, live: bool = False) -> Needed:
    """Return every digest that a run's steps and tasks name, and that the manifests among them name.

    A manifest that is not there is lost to a live run; of one that is over it may have been removed.
    """
    steps = journal.steps(run)
    tasks = journal.tasks(run)
    needed = Needed(_named(json.dumps(steps)) | {task.update for task in tasks if task.update})
    needed.digests |= {digest for task in tasks for digest in _named(task.spec.decode())}
    for bundle in (value for value in steps.values() if "manifest" in value):
        try:
            needed.digests |= _named(blobs.path(bundle["manifest"]).read_text())
        except (NotFoundError, MismatchError) as error:
            if isinstance(error, NotFoundError) and not live:
                continue
            needed.lost.append(error)
            needed.known &= "files" in bundle.get("bundle", {})  # else an earlier version kept it
    return needed


def _named(text: str) -> set[str]:
    """Return the digests that stand in a text."""
    return {match[0] for match in DIGEST.finditer(text)}
