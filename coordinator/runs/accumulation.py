"""What a run may remember, and be held to by what earlier ones have learned; judged as all of it, in `legality`."""

from collections.abc import Collection

from offsite.coordinator import memory
from offsite.coordinator.aggregation import Strategy
from offsite.coordinator.runs import pairs
from offsite.emulator import objectives, retention
from offsite.emulator.methods import Method
from offsite.emulator.methods.base import Carrying
from offsite.kernels.schema import Tier
from offsite.protos.errors import InputError
from offsite.protos.spec import MEMORY, RETENTION, RunSpec


def judge_memory(spec: RunSpec, method: Method, strategy: Strategy) -> None:
    """Raise InputError if a run's memory is not known, or cannot accumulate what its method trains."""
    own = memory.make(spec.memory.name, spec.memory.settings)
    others = ", ".join(pairs.memories(method, strategy))
    if own.accumulates and isinstance(method, Carrying):
        raise InputError(
            f"memory {own.name} has nothing to accumulate in a run of {method.name}, which changes no adapter and "
            f"hands on what the memory of its start keeps; use memory {MEMORY.name}"
        )
    if not method.rules <= own.rules:
        raise InputError(
            f"memory {own.name} cannot accumulate what method {method.name} trains, whose tensors are averaged by "
            f"{', '.join(sorted(method.rules))}; use one of: {others}"
        )
    if own.divides and not pairs.is_private(method):
        raise InputError(
            f"memory {own.name} keeps by task what is private, and method {method.name} as it is set has "
            f"nothing of that; use {' or '.join(pairs.private())}, or one of the memories: {others}"
        )
    if not pairs.remembers(own, method, strategy):
        raise InputError(
            f"memory {own.name} has sites go on from its average, and strategy {strategy.name} would make another of "
            f"it for them; use a strategy that is exact by {', '.join(sorted(method.rules))}, or one of the memories: "
            f"{others}"
        )
    if own.combine == "route" and not spec.task:
        raise InputError(
            f"memory {own.name} keeps what each task has learned; name this run's, as in task = 'hospital'"
        )
    if spec.known_by and own.combine != "route":
        raise InputError(
            f"known_by: memory {own.name} keeps nothing by task, so that none has to be told from others; leave it out"
        )
    if spec.merge and own.combine != "one":
        raise InputError(
            f"merge: memory {own.name} as it is set answers by several adapters, and no one model has them merged; "
            "leave merge out, or have the memory serve one"
        )


def judge_retention(spec: RunSpec, method: Method, strategy: Strategy, *, tiers: Collection[Tier]) -> None:
    """Raise InputError for a retention that has nothing to hold to, or cannot hold what the run trains."""
    chosen, objective = spec.training.retention, spec.training.objective
    try:
        held = retention.make(chosen.name, chosen.settings)
    except ValueError as error:
        raise InputError(str(error)) from error
    what = f"training.retention: {held.name}"
    if held.starts and not spec.start:
        raise InputError(
            f"{what} holds training to the version that a run goes on from, and this one begins anew; name that "
            f"version as start, or use retention {RETENTION.name}"
        )
    others = ", ".join(pairs.retentions(method, strategy))
    if not pairs.retains(held, method):
        raise InputError(f"{what} cannot hold what method {method.name} trains; use one of: {others}")
    if held.valued and not pairs.keeps_values(method, strategy):
        raise InputError(
            f"{what} compares values one by one, and strategy {strategy.name} writes products in other factors after "
            f"each round; use one of the strategies {', '.join(pairs.keeping(method)) or 'none'}, or one of the "
            f"retentions {others}"
        )
    if held.valued and len(tiers) > 1:
        raise InputError(f"{what} compares values one by one, and sites of several tiers have others; use one tier")
    if not held.compares and objectives.make(objective.name, objective.settings).compares:
        raise InputError(
            f"{what} is about text that is predicted, and the objective {objective.name} compares answers; use one of: "
            f"{', '.join(name for name in others.split(', ') if retention.RETENTIONS[name].compares)}"
        )
