"""Going on from a version of another run: which one it is, and whether a run may."""

from collections.abc import Callable
from typing import NamedTuple

from offsite.coordinator import memory as memories
from offsite.coordinator.aggregation.base import RETENTION
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import GRANT, History
from offsite.coordinator.runs.steps.orders import Continued
from offsite.coordinator.runs.steps.results import BUILD, GATE, fold, release
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.journal import Journal
from offsite.emulator import retention
from offsite.kernels.schema import Tier
from offsite.protos.documents import canonical, from_json, plain, to_plain
from offsite.protos.errors import InputError
from offsite.protos.spec import MEMORY, Ancestor, Choice, RunSpec, TrainingSpec


def granted(journal: Journal, run: str) -> Grant:
    """Return a run as the owner let it in; raises NotFoundError."""
    return History(journal, run).get(GRANT) or from_json(Grant, journal.run(run).spec, where="run spec")


def ancestor(journal: Journal, start: str, *, field: str = "start") -> Ancestor:
    """Return the version that RUN or RUN:ROUND stands for; raises NotFoundError, and InputError if it is not there."""
    run, _, number = start.partition(":")
    state, done = journal.run(run).state, journal.rounds_done([run]).get(run, 0)
    if not done:
        raise InputError(f"{field}: run {run} is {state}, and none of its rounds is done")
    if not number and state != "completed":
        raise InputError(f"{field}: run {run} is {state}; name a round of it that is done, such as {run}:{done}")
    if int(number or done) > done:
        raise InputError(f"{field}: run {run} has no round {number}; {run}:{done} is the last that is done")
    gone = journal.withdrawn([run])
    left = [at for at in range(1, done + 1) if (run, at) not in gone]
    chosen = int(number) if number else max(left, default=done)
    if row := gone.get((run, chosen)):
        last = f"{run}:{left[-1]} is the last that was not" if left else "and so was all of the run; name another"
        raise InputError(f"{field}: {run}:{chosen} was taken back by {row.by} ({plain(row.reason)}); {last}")
    if why := unreleased(journal, run, chosen):
        raise InputError(f"{field}: {why}")
    before = granted(journal, run).continues
    return Ancestor(run=run, round=chosen, rounds=chosen + (before.rounds if before else 0))


def unreleased(journal: Journal, run: str, number: int) -> str:
    """Say why nobody may have the version of a round: the run's gate holds it back, or has not judged; else empty."""
    if not granted(journal, run).gate:
        return ""
    history = History(journal, run)
    if history.get(release(0)) or history.get(release(number)):
        return ""
    verdict = history.get(GATE)
    if verdict is None:
        return f"{run}:{number} is not released: the gate of run {run} has not judged its outcome"
    if verdict.against:
        return f"{run}:{number} is held back by its run's gate ({plain(verdict.against, most=1000)}); ask the owner"
    return ""


def version(journal: Journal, continues: Ancestor) -> Version:
    """Return the version that a run goes on from."""
    return History(journal, continues.run)[fold(continues.round)].version


def continued(journal: Journal, continues: Ancestor) -> Continued:
    """Return the version that a run goes on from, with what it was trained on."""
    built = History(journal, continues.run)[BUILD]
    return Continued(
        method=granted(journal, continues.run).method,
        version=version(journal, continues),
        base=built.base.digest,
        trainable=built.bundle.trainable,
        recovery=built.recovery,
    )


class Left(NamedTuple):
    """What the version of a run is of, as the next one goes on from it."""

    method: Choice  # whose adapter it has
    measured: frozenset[str] = frozenset()  # names of what was measured of that


def own(spec: RunSpec) -> Left:
    """Return that of a run whose method nothing is known of but its name."""
    return Left(spec.method)


def _keeper(journal: Journal, grant: Grant, leaves: Callable[[RunSpec], Left]) -> Choice:
    """Return the memory that keeps what a version has of it: runs that measured have handed it on."""
    while leaves(grant).measured and grant.continues:
        grant = granted(journal, grant.continues.run)
    return grant.memory


def unlike(its: Choice, wanted: Choice) -> str:
    """Say that a version is of another method than the one that a run needs; empty: it is of the same."""
    theirs, ours = (canonical(to_plain(choice)).decode() for choice in (its, wanted))
    return "" if theirs == ours else f"is of method {theirs}, this run of {ours}; a run goes on with the same"


def _lacking(training: TrainingSpec, there: set[str]) -> str:
    """Say what a version lacks of what a run's retention needs; empty: nothing."""
    held = retention.make(training.retention.name, training.retention.settings)
    return "".join(
        f"has no {name}, which training.retention {held.name} needs; run the method {name} on from it, and go on from "
        "that run"
        for name in sorted(held.asks - there)[:1]
    )


def judge(
    journal: Journal,
    blobs: Blobs,
    grant: Grant,
    *,
    tiers: frozenset[Tier],
    begins: Callable[[RunSpec], str] | None = None,
    leaves: Callable[[RunSpec], Left] = own,
) -> None:
    """Raise InputError with one sentence if a run cannot go on from the version that it names.

    `tiers` are those of its sites, as far as it names any. What only the built emulator shows is judged then. `begins`
    is given where the run makes its start of the other's version, and says why it cannot; empty: it can. `leaves` asks
    the other's method what its version has.
    """
    if grant.continues is None:
        return
    other, last = granted(journal, grant.continues.run), version(journal, grant.continues)
    what = f"start: round {grant.continues.round} of run {grant.continues.run}"
    left = leaves(other)
    if why := begins(other) if begins else unlike(left.method, grant.method):
        raise InputError(f"{what} {why}")
    for name in ("model", "trainable"):
        ours, its = (canonical(to_plain(spec)[name]).decode() for spec in (grant, other))
        if ours != its:
            raise InputError(f"{what} is of {name} {its}, this run of {ours}; a run goes on with the same")
    if (state := sorted(last.bare.state)) and grant.strategy.name != other.strategy.name:
        raise InputError(
            f"{what} keeps what strategy {grant.strategy.name} does not know ({', '.join(state)}); go on with "
            f"{other.strategy.name}"
        )
    remembered = sorted(name for name in last.state if name.startswith(memories.PREFIX))
    memory, keeper = memories.make(grant.memory.name, grant.memory.settings), _keeper(journal, other, leaves).name
    if remembered and memory.accumulates and memory.name != keeper:
        raise InputError(
            f"{what} keeps what memory {memory.name} does not know ({', '.join(remembered)}); go on with "
            f"{keeper}, or with {MEMORY.name}, which forgets it"
        )
    there = {name.removeprefix(RETENTION) for name in last.state} | left.measured
    if why := _lacking(grant.training, there):
        raise InputError(f"{what} {why}")
    if not begins and (missing := sorted(tiers - last.broadcast.keys())):
        raise InputError(
            f"{what} has nothing for sites of tier {missing[0]}, only of {', '.join(sorted(last.broadcast))}"
        )
    if not all(digest in blobs for digest in last.digests):
        raise InputError(f"{what} is gone: what a run worked with is kept for some days only (offsite coordinator gc)")
