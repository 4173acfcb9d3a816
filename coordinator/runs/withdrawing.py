"""Taking a site out of a run that is over: the run is done again without it, and what held its work is taken back."""

import time
from dataclasses import replace
from typing import Any

from offsite.coordinator.runs.continuing import granted
from offsite.coordinator.runs.extending import alters
from offsite.coordinator.runs.grant import Replay
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.lineage import later
from offsite.coordinator.runs.steps.results import fold, roster
from offsite.coordinator.store.journal import Journal
from offsite.kernels.schema import Tier
from offsite.protos.documents import from_json
from offsite.protos.errors import ConflictError, InputError, NotFoundError
from offsite.protos.spec import RunSpec


def again(journal: Journal, run: str, site: str, *, by: str, reason: str) -> tuple[RunSpec, Replay]:
    """Return the run that does another one again without a site, from the first round that the site took part in.

    Raises NotFoundError, InputError without a reason, for a site that gave no update, and where the outcome would not
    be that of a run without it; ConflictError while a run is at work on what holds its work.
    """
    if not reason.strip():
        raise InputError("a withdrawal needs a reason, which stays with the versions that it takes back")
    row, history = journal.run(run), History(journal, run)
    done = journal.rounds_done([run]).get(run, 0)
    first = next((at for at in range(1, done + 1) if site in history[fold(at)].sites), 0)
    if not first:
        raise NotFoundError(
            f"no version of run {run} has an update of site {site}; `offsite version ls {run}` shows whose"
        )
    if live := sorted(other for other in later(journal, run, first - 1) if journal.is_live(other)):
        raise ConflictError(f"run {live[0]} is not over and holds the work of {site}; cancel it, or wait for its end")
    spec = from_json(RunSpec, row.spec, where="run spec")
    rest = tuple(sorted(history.tiers(first - 1).keys() - {site}))
    if not rest:
        raise InputError(f"{site} is the only site of run {run}; take its versions back (offsite version rollback)")
    why = alters(spec)
    joined, expected = {at: _joined(history, at) for at in range(first, done)}, {*rest}
    for at, others in joined.items():
        expected |= others.keys()
        if history.tiers(at).keys() - {site} != expected:
            raise InputError(
                f"run {run} cannot be done again from round {first}: other sites than {site} left it after that; "
                f"submit it anew without {site}"
            )
    if why and (first > 1 or spec.staleness or spec.sites_per_round):
        raise InputError(f"run {run} cannot be done again from round {first}: {why}; submit it anew without {site}")
    before = granted(journal, run).continues
    start = f"{run}:{first - 1}" if first > 1 else f"{before.run}:{before.round}" if before else ""
    changes: dict[str, Any] = {
        "start": start,
        "rounds": done - first + 1,
        "sites": rest,
        "min_sites": min(spec.min_sites, len(rest)),
        "quorum": min(spec.quorum, len(rest)),
        "join": False,
    }
    every = spec.evaluate_every or int(bool(spec.patience))  # it does not stop: it has as many rounds as there were
    replays = Replay(
        run=run,
        round=first,
        site=site,
        by=by,
        at=time.time(),
        reason=reason,
        keeps=not why or done == first == 1,
        joins=spec.join,
        joined={at - first + 1: others for at, others in joined.items() if others},
    )
    return replace(spec, **changes, patience=0, least_gain=0.0, evaluate_every=every), replays


def _joined(history: History, number: int) -> dict[str, Tier]:
    """Return by site what it trains, of those that came before a round, counted from zero."""
    opened = history.get(roster(number + 1))
    return opened.joined if opened else {}


def take_back(journal: Journal, replays: Replay) -> None:
    """Take back all that holds a site's work, and publish it no longer; done again, it changes nothing."""
    after = later(journal, replays.run, replays.round - 1)
    journal.withdraw(after, by=replays.by, reason=replays.words)
    for run in after:
        journal.forget_artifacts(run)
