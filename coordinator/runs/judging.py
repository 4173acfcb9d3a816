"""Which version of a run is the best, and when it has gained enough: both follow from what the journal has."""

import math

from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.results import Evaluation, Stop, evaluate
from offsite.protos.figures import PLUG_IN, perplexity
from offsite.protos.spec import RunSpec


def due(spec: RunSpec, number: int) -> bool:
    """Tell whether the version of a round, counted from one, is measured before the run's end."""
    every = 1 if spec.contributions else spec.evaluate_every or bool(spec.patience)
    return bool(spec.evaluation and every and number % every == 0)


def plugged(history: History, number: int, *, last: int) -> Evaluation | None:
    """Return the plug-in's figure of a round's version, which may be that of a run's outcome; None: not measured."""
    measured = history.get(evaluate(f"{PLUG_IN}:{number}"))
    return measured or (history.get(evaluate(PLUG_IN)) if number == last else None)


def judged(history: History, number: int) -> float | None:
    """Return the loss by which a round's version is judged, in nats a token, infinite where it is no finite number.

    It is the plug-in's over the owner's held-out sets; None where it was not measured.
    """
    measured = history.get(evaluate(f"{PLUG_IN}:{number}"))
    if measured is None:
        return None
    loss = math.log(perplexity(measured.sets.values()))
    return loss if math.isfinite(loss) else math.inf


def best(history: History, last: int) -> int | None:
    """Return the round whose version is the best so far, the earliest of equals; None where none was measured."""
    losses = {number: loss for number in range(1, last + 1) if (loss := judged(history, number)) is not None}
    return min(losses, key=lambda number: (losses[number], number)) if losses else None


def stop(spec: RunSpec, history: History, number: int) -> Stop | None:
    """Return why a run stops after a round; None: it goes on.

    A version that is better than the best by `least_gain` is a gain, and the best from then on; of `patience` rounds
    one has to bring one. Small steps add up: each is held against the last gain, not against the round before.
    """
    gain, reached = 0, math.inf
    for at in range(1, number + 1):
        loss = judged(history, at)
        if loss is not None and (not gain or loss < reached - spec.least_gain):
            gain, reached = at, loss
    if not spec.patience or judged(history, number) is None or number - gain < spec.patience:
        return None
    least = f" by {spec.least_gain:g} nats" if spec.least_gain else ""
    words = (
        f"stopped after round {number} of {spec.rounds}: for {number - gain} rounds no version has been better{least} "
        f"than that of round {gain}, at {reached:.4f} nats a token"
    )
    return Stop(round=number, best=best(history, number) or number, reason=words)
