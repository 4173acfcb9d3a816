"""The end of a run: its outcome is measured, attacked and published."""

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from offsite.coordinator.runs import judging
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.orders import Attack, Gate, Order, Publish, Tune
from offsite.coordinator.runs.steps.results import ATTACK, BUILD, GATE, LAST, PUBLISH, Evaluation, Step, evaluate, fold
from offsite.coordinator.store.blobs import Stored
from offsite.protos import figures
from offsite.protos.events import Event, Held, Measured
from offsite.protos.figures import BASE_TUNED, BASE_ZERO_SHOT, EMULATOR_TUNED, PLUG_IN, perplexity
from offsite.protos.ranges import finite

R = TypeVar("R")

OVERALL = (BASE_ZERO_SHOT, PLUG_IN)  # figures that a gate looks at


class Do(Protocol):
    """Does a step unless the journal has it, and tells of what it gave."""

    def __call__(self, step: Step[R], order: Order, tell: Callable[[R], list[Event]] = ...) -> R:
        """Return what the step gave."""
        ...


class Measure(Protocol):
    """Measures a figure unless the journal has it."""

    def __call__(
        self, figure: str, *, manifest: str | None, adapter: str | None, memory: dict[str, str] | None = None
    ) -> None:
        """Keep the figure of the base, or of the emulator of a manifest, with an adapter or without."""
        ...


def outcome(history: History, planned: int) -> int:
    """Return the round whose version is a run's outcome: the best of those that were measured, else the last."""
    last = history.rounds(planned)
    return judging.best(history, last) or last


def end(spec: Grant, history: History, do: Do, measure: Measure) -> dict[str, Stored]:
    """Return the files that a run publishes, by name: its outcome, and its last version where that is another.

    All figures are those of the outcome. Where its gate does not hold, the files are made, and none is published.
    """
    built, last = history[BUILD], history.rounds(spec.rounds)
    if any(judging.judged(history, number) is not None for number in range(1, last)):
        newest = history.version(last)
        measure(f"{PLUG_IN}:{last}", manifest=None, adapter=newest.adapter, memory=newest.memory)
    chosen = outcome(history, spec.rounds)
    version, manifest = history[fold(chosen)].version, history.bundle(chosen - 1).manifest
    if spec.evaluation:
        measure(EMULATOR_TUNED, manifest=manifest, adapter=version.adapter)
        if (known := judging.plugged(history, chosen, last=0)) and not history.get(evaluate(PLUG_IN)):
            history.record(evaluate(PLUG_IN), known, Measured(name=PLUG_IN, sets=known.sets))
        measure(PLUG_IN, manifest=None, adapter=version.adapter, memory=version.memory)
    if spec.attack_steps:
        if spec.attack_text:
            tune = Tune(base=built.base.digest, trainable=built.bundle.trainable)
            do(evaluate(BASE_TUNED), tune, partial(_measured, BASE_TUNED))
        attack = Attack(manifest=manifest, adapter=version.adapter)
        do(ATTACK, attack, lambda result: _measured(figures.ATTACK, result.attacks[0]))
    if spec.gate:
        overall = {name: perplexity(done.sets.values()) for name in OVERALL if (done := history.get(evaluate(name)))}
        gate = Gate(
            base=built.base.digest,
            adapter=version.adapter,
            recovery=built.recovery,
            memory=version.memory,
            figures={name: finite(value) for name, value in overall.items()},
        )
        do(GATE, gate, lambda verdict: [Held(message=verdict.against)] if verdict.against else [])
    files: dict[str, Stored] = {}
    for step, number, folder in ((PUBLISH, chosen, ""), (LAST, last, "last")):
        if step is PUBLISH or number != chosen:
            one = history.version(number)
            order = Publish(
                base=built.base.digest, adapter=one.adapter, recovery=built.recovery, memory=one.memory, folder=folder
            )
            files |= do(step, order).artifacts
    verdict = history.get(GATE)
    return {} if verdict and verdict.against else files


def _measured(figure: str, result: Evaluation) -> list[Event]:
    return [Measured(name=figure, sets=result.sets)]
