"""What follows from what was measured: protection, warnings, who is dominated, and which candidate to hand out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from offsite.coordinator.comparison.rows import FIVE, Measured, Predicted, Protection, Row
from offsite.coordinator.runs.report import warnings
from offsite.emulator import builders, modality
from offsite.emulator.evaluation.protection import Reach, protection
from offsite.protos.figures import BASE_TUNED, BASE_ZERO_SHOT, EMULATOR_TUNED, EMULATOR_ZERO_SHOT, PLUG_IN

TOLERANCE = 1.02  # plug-ins within this factor of the best one's perplexity count as equally good

# Of each, less is better.
OBJECTIVES: Mapping[str, Callable[[Measured, Protection], float]] = {
    "plug-in perplexity": lambda candidate, _: candidate.plug_in,
    "share disclosed verbatim": lambda candidate, _: candidate.disclosed,
    "margin over the attacks": lambda _, safe: -safe.margin,
    "bytes to download": lambda candidate, _: candidate.emulated.bytes,
    "FLOPs of a client step": lambda candidate, _: candidate.client.flops,
    "peak memory of a client step": lambda candidate, _: candidate.client.peak_bytes,
}


def judged(row: Row, *, protected_from: float | None) -> Row:
    """Return a row with its protection and the warnings that it calls for."""
    if row.measured is None:
        return row
    figures = row.measured.figures
    # Training can make an emulator worse; nobody who attacks is bound to keep what it gave.
    without = {"leave it as it is": figures[EMULATOR_ZERO_SHOT], "tune it as asked": figures[EMULATOR_TUNED]}
    attacks = {one.name: one.score for one in row.measured.every_attack} | without
    judgement = protection(
        {name: Reach(_likelihood(score.held_out), _likelihood(score.general)) for name, score in attacks.items()},
        plug_in=_likelihood(figures[PLUG_IN].held_out),
        base=_likelihood(figures[BASE_ZERO_SHOT].general),
        threshold=protected_from,
    )
    return replace(
        row,
        protection=Protection(margin=judgement.margin, label=judgement.label, reason=judgement.reason),
        warnings=tuple(warnings({name: figures[name].held_out.perplexity for name in FIVE})),
    )


def frontier(rows: Sequence[Row]) -> set[int]:
    """Return the numbers of the candidates without a warning that no other of them dominates.

    One dominates another if it is nowhere worse and somewhere better.
    """
    points = {
        row.number: [of(row.measured, row.protection) for of in OBJECTIVES.values()]
        for row in rows
        if row.measured and row.protection and not row.warnings
    }

    def dominated(point: list[float]) -> bool:
        return any(
            other != point and all(theirs <= ours for theirs, ours in zip(other, point, strict=True))
            for other in points.values()
        )

    return {number for number, point in points.items() if not dominated(point)}


def recommend(rows: Sequence[Row], *, protected_from: float | None) -> tuple[int | None, str]:
    """Return the number of the candidate to hand out, or None, and the reason.

    The rule: of the candidates whose emulator is usable, whose plug-in beats the base and, if a threshold was stated,
    that are protected by it, those with the best plug-in within TOLERANCE; of these the one with the fewest bytes,
    which bound what it can disclose; of equals the one that discloses least verbatim.
    """
    if not any(row.measured for row in rows):
        return None, "No candidate could be measured; the rows say why."
    useful = [row for row in rows if row.measured and not row.warnings]
    if not useful:
        return None, (
            "No candidate is worth handing out: each has an emulator that is too small to be useful, a plug-in that "
            "does not beat the base, or figures that cannot be right. Keep more layers, "
            f"add {builders.of('tuning')} to the chain, or train for more steps."
        )
    allowed = useful
    if protected_from is not None:
        allowed = [row for row in useful if row.protection and row.protection.label == "protected"]
        if not allowed:
            return None, _unprotected(useful, protected_from)
    best = min(row.measured.plug_in for row in allowed if row.measured)
    close = {row.number: row.measured for row in allowed if row.measured and row.measured.plug_in <= TOLERANCE * best}
    number = min(close, key=lambda one: (close[one].emulated.bytes, close[one].disclosed, close[one].plug_in, one))
    chosen = next(row for row in allowed if row.number == number)
    return number, _reason(chosen, best=best, close=len(close), allowed=len(allowed), protected_from=protected_from)


def _reason(row: Row, *, best: float, close: int, allowed: int, protected_from: float | None) -> str:
    assert row.measured and row.protection
    group = "with a usable emulator and a plug-in that beats the base"
    if protected_from is not None:
        group += f", protected by the stated threshold of {protected_from:g} nats"
    if allowed == 1:
        text = f"It is the only candidate {group}."
    elif close == 1:
        text = f"Of the {allowed} candidates {group}, it has the best plug-in, by more than {TOLERANCE - 1:.0%}."
    else:
        text = (
            f"Of the {allowed} candidates {group}, {close} have a plug-in within {TOLERANCE - 1:.0%} of the best "
            f"({best:.2f}); of these it has the fewest bytes to download ({row.measured.emulated.bytes / 1e6:.1f} MB), "
            "which bound what it can disclose."
        )
    figures = row.measured.figures
    text += (
        f" Perplexity: plug-in {row.measured.plug_in:.2f}, base {figures[BASE_ZERO_SHOT].held_out.perplexity:.2f}, "
        f"bound {figures[BASE_TUNED].held_out.perplexity:.2f}."
    )
    if protected_from is None:
        text += f" It is not called protected: {row.protection.reason}."
    return text


def _unprotected(useful: Sequence[Row], protected_from: float) -> str:
    nearest, margin = max(
        ((row.number, row.protection.margin) for row in useful if row.protection), key=lambda pair: pair[1]
    )
    return (
        f"No candidate is protected: the threshold is {protected_from:g} nats, and the largest margin over the attacks "
        f"is {margin:.2f} (number {nearest}). To change that, give away less (fewer or narrower layers, fewer bits) or "
        "raise the plug-in above what the attacks reach (more steps, more data). Otherwise hand out an emulator only "
        "to sites that may have what the attacks make of it, and do not call it protected."
    )


def _likelihood(prediction: Predicted) -> modality.Score:
    return modality.Score(prediction.nll, prediction.tokens)
