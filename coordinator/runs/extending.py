"""More rounds of a run that is over: a run that goes on from a version of it, with the bytes of one of that length."""

from dataclasses import replace

from offsite.coordinator import memory
from offsite.coordinator.runs.continuing import ancestor
from offsite.coordinator.runs.history import History
from offsite.coordinator.store.journal import Journal
from offsite.emulator import retention
from offsite.protos import upload
from offsite.protos.documents import from_json
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.spec import SCHEDULE, RunSpec


def extension(journal: Journal, run: str, *, rounds: int, number: int = 0) -> RunSpec:
    """Return the run of so many more rounds, from the version of a round or, with 0, from the newest that stands.

    Its sites are those of that round, and it does not stop before its end: that many rounds are asked for. Raises
    NotFoundError, ConflictError while the run is at work, and InputError for a version that is not there, or where
    more rounds of the same run would have given other bytes.
    """
    row = journal.run(run)
    if journal.is_live(run):
        raise ConflictError(f"run {run} is {row.state}; wait for its end, or cancel it, and extend it then")
    done = journal.rounds_done([run]).get(run, 0)
    if not number and row.state != "completed":
        number = done
    at = ancestor(journal, f"{run}:{number}" if number else run)
    spec = from_json(RunSpec, row.spec, where="run spec")
    if why := alters(spec):
        raise InputError(
            f"run {run} cannot be extended: {why}, so that a run of more rounds would have other bytes; submit one of "
            f"that length, or one that goes on as it can (start = '{run}:{at.round}')"
        )
    sites = tuple(sorted(History(journal, run).tiers(at.round - 1)))
    return replace(spec, start=f"{run}:{at.round}", rounds=rounds, sites=sites, join=False, patience=0, least_gain=0.0)


def alters(spec: RunSpec) -> str:
    """Say why going on from a version of a run is not the same as more rounds of it; empty: it is."""
    training, remembers = spec.training, memory.make(spec.memory.name, spec.memory.settings)
    holds = retention.make(training.retention.name, training.retention.settings)
    feeding = [stage.name for stage in upload.make(spec.upload) if stage.feedback]
    if training.span == "run" and (training.schedule != SCHEDULE or training.warmup_steps):
        return "its learning rate goes over all of its rounds (training.span)"
    if spec.realign_steps:
        return "its emulator is tuned again after each round (realign_steps)"
    if spec.staleness:
        return "late updates of its rounds are folded into later ones (staleness)"
    if spec.sites_per_round:
        return "which sites a round asks is drawn anew in each run (sites_per_round)"
    if feeding:
        return f"sites send what stage {feeding[0]} left out with the next update of the same run (upload)"
    if remembers.paced:
        return f"memory {remembers.name} moves at a pace that the number of rounds gives it"
    if holds.active:
        return f"retention {holds.name} holds its sites to what it began from (training.retention)"
    return ""
