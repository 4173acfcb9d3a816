"""Going on from another simulation: the version that it ended in, brought into the folder of the next one.

Each simulation has a journal of its own, in which its run has the same name. Those before it are there by numbers: the
oldest is simulation-1. Of them the next one needs what they were, and of the last one what its sites start from.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from offsite.client.forgetting import Forgetting, forgetting
from offsite.coordinator.home import Home
from offsite.coordinator.runs import continuing, legality
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.results import BUILD, fold
from offsite.coordinator.store.journal import Journal
from offsite.deploy.simulation.rounds import RUN
from offsite.emulator import retention
from offsite.emulator.retention import Rehearsing
from offsite.protos.documents import to_plain
from offsite.protos.errors import InputError
from offsite.protos.events import Completed
from offsite.protos.spec import RunSpec


def continued(spec: RunSpec, start: Path) -> Grant:
    """Return a run as it goes on from the simulation in a folder; raises InputError if it cannot."""
    held = retention.make(spec.training.retention.name, spec.training.retention.settings)
    if isinstance(held, Rehearsing):
        raise InputError(
            f"training.retention: {held.name} has sites keep rows from one task to the next, and virtual ones keep none"
        )
    with _opened(start) as (home, journal):
        if (state := journal.run(RUN).state) != "completed":
            raise InputError(f"start: the simulation in {start} is {state}; a simulation goes on from one that is over")
        grant = Grant(**vars(replace(spec, start=RUN)), continues=continuing.ancestor(journal, RUN))
        legality.judge(grant)
        continuing.judge(
            *(journal, home.blobs(), grant),
            tiers=legality.tiers(grant),
            begins=legality.beginning(grant),
            leaves=legality.leaves,
        )
        assert grant.continues
        name = _names(journal)[RUN]
        return replace(grant, start=name, continues=replace(grant.continues, run=name))


def bring(home: Home, journal: Journal, start: Path) -> None:
    """Bring what the next simulation needs of the one in a folder; done again, it changes nothing."""
    with _opened(start) as (other, its):
        history, blobs = History(its, RUN), other.blobs()
        last = fold(history.rounds(continuing.granted(its, RUN).rounds))
        for digest in history[last].version.digests:
            file = home.node.scratch / "brought"
            shutil.copyfile(blobs.path(digest), file)
            home.node.blobs().take(file, digest=digest)
        for run, name in _names(its).items():
            row, grant = its.run(run), continuing.granted(its, run)
            journal.add_run(name, token=name, owner=row.owner, spec=row.spec, granted=to_plain(grant))
            if run == RUN:
                journal.add_step(name, BUILD.name, to_plain(history[BUILD]))
                journal.add_step(name, last.name, to_plain(history[last]))
            journal.end_run(name, Completed(), report=row.report)


def stream(journal: Journal) -> Forgetting | None:
    """Return what a simulation, and those that led to it, have left of each task; None where none led to it.

    None also where no run says which task it learned, or none was measured.
    """
    runs = [*_names(journal)]
    try:
        return forgetting([json.loads(journal.run(run).report) | {"run": run} for run in runs]) if runs[1:] else None
    except InputError:
        return None


def _names(journal: Journal) -> dict[str, str]:
    """Return the runs of a simulation's journal, the oldest first, by what they are called in that of the next one."""
    runs = [RUN]
    while before := continuing.granted(journal, runs[0]).continues:
        runs.insert(0, before.run)
    return {run: f"{RUN}-{number}" for number, run in enumerate(runs, start=1)}


@contextmanager
def _opened(start: Path) -> Iterator[tuple[Home, Journal]]:
    root = start.resolve() / "home"
    if not (root / "settings.json").is_file():
        raise InputError(f"start: {start} is not the folder of a simulation (--out); name one whose simulation is over")
    home = Home(root, root)
    journal = home.journal()
    try:
        yield home, journal
    finally:
        journal.close()
