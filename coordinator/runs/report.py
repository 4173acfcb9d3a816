"""The report of a run: the figures of its tuning, what it moved, and where its time went."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from offsite.coordinator.runs import predictions
from offsite.coordinator.runs.contributions import contributions
from offsite.coordinator.runs.ending import outcome
from offsite.coordinator.runs.history import GRANT, History
from offsite.coordinator.runs.judging import plugged
from offsite.coordinator.runs.steps import results
from offsite.coordinator.runs.steps.results import BUILD, evaluate, fold
from offsite.coordinator.store.journal import Journal, Row
from offsite.protos.documents import from_json, to_plain
from offsite.protos.exams import Exam
from offsite.protos.figures import (
    ATTACK,
    BASE_TUNED,
    BASE_ZERO_SHOT,
    EMULATOR_TUNED,
    EMULATOR_ZERO_SHOT,
    PLUG_IN,
    Score,
    marks,
    perplexity,
    protection,
    sentences,
    title,
    without_infinities,
)
from offsite.protos.spec import EXAMS, LocalTraining, RunSpec, UpdateMetrics
from offsite.protos.timeline import seconds

MEASURED = (BASE_ZERO_SHOT, EMULATOR_ZERO_SHOT, EMULATOR_TUNED, PLUG_IN, BASE_TUNED)
BUNDLE = ("builders", "parameters", "bytes", "disclosed", "disclosed_lossy")
OWN_TEXT = "the owner's own text of the task, not the sites'"
UNUSABLE = 50.0  # times the base's perplexity: an emulator beyond it hardly guides training


def assemble(journal: Journal, run: str) -> str:
    """Return the report of a run as JSON, from nothing but the journal."""
    row, history, everything = journal.run(run), History(journal, run), journal.tasks(run)
    tasks = [task for task in everything if task.round < EXAMS]
    spec = from_json(RunSpec, row.spec, where="run spec")
    accepted = [(task, from_json(UpdateMetrics, task.metrics, where="metrics")) for task in tasks if task.metrics]
    spans = [{"who": "coordinator", "step": name, **to_plain(span)} for name, span in history.spans()]
    spans += [
        {"who": task.site, "step": f"round {task.round + 1}", **to_plain(span)}
        for task, metrics in accepted
        for span in metrics.spans
    ]
    measured = {name: done.sets for name in MEASURED if (done := history.get(evaluate(name)))}
    attacks = result.attacks if (result := history.get(results.ATTACK)) else ()
    if attacks:
        measured[ATTACK] = attacks[0].sets
    overall, sites = perplexities(measured)
    built, last, stop = history[BUILD], history.rounds(spec.rounds), history.get(results.STOP)
    folded = [history[fold(number + 1)] for number in range(last)]
    bundle = to_plain(built.bundle)
    exam = predictions.told(history, everything, last=last, chosen=outcome(history, spec.rounds))
    misled = [warning] if exam and (warning := exam["prediction"]["warning"]) else []
    report = {
        "run": run,
        "name": spec.name,
        "model": spec.model,
        "continues": to_plain(grant.continues) if (grant := history.get(GRANT)) and grant.continues else None,
        "base": to_plain(built.base),
        "bundle": {key: bundle[key] for key in (*BUNDLE, "layers", "trainable")},
        "method": to_plain(spec.method),
        "strategy": to_plain(spec.strategy),
        "memory": to_plain(spec.memory),
        "task": spec.task,
        "upload": [to_plain(stage) for stage in spec.upload],
        "training": to_plain(training(spec, built.learning_rate)),
        "rounds": [_round(number, history, accepted, last) for number in range(last)],
        "outcome": {"round": outcome(history, spec.rounds), "last": last, "stopped": stop.reason if stop else ""},
        "gate": [to_plain(one) for one in verdict.findings] if (verdict := history.get(results.GATE)) else [],
        "overall": overall,
        "sites": sites,
        "exam": exam,
        "experts": _experts(history),
        "tokens": {name: score.tokens for name, score in measured.get(BASE_ZERO_SHOT, {}).items()},
        "bytes": {way: sum(getattr(task, f"bytes_{way}") for task in everything) for way in ("down", "up")},
        "seconds": seconds(spans, start=row.submitted_at, end=time.time()),
        "spans": spans,
        "left_out": [
            {"round": task.round + 1, "site": task.site, "state": task.state, "message": task.message}
            for task in {(task.round, task.site): task for task in tasks}.values()  # the last attempt of each
            if task.state != "uploaded"
        ]
        + [
            {"round": number + 1, "site": site, "state": "left out", "message": why}
            for number, version in enumerate(folded)
            for site, why in version.left_out.items()
        ],
        "late": [
            {"round": number + 1 - part.age, "site": site, "folded_in": number + 1, "weight": part.weight}
            for number, version in enumerate(folded)
            for site, part in version.late.items()
        ],
        "vocabulary": built.vocabulary,
        "warnings": warnings(overall, vocabulary=built.vocabulary) + misled,
        "attacks": [{"name": one.name, "overall": perplexity(one.sets.values())} for one in attacks],
        "protection": protection(
            overall, [one.name for one in attacks], task=bool(spec.attack_text), tuned_on=OWN_TEXT
        ),
    }
    report["marks"] = marks(report)
    document, gone = without_infinities(report)
    return json.dumps(document | {"not_finite": gone}, allow_nan=False)


def training(spec: RunSpec, learning_rate: float, *, number: int | None = None) -> LocalTraining:
    """Return how the sites of a run train, with the rate that was chosen when its emulator was built.

    In a round, by its `number` from 0, with where that is on a schedule that goes over the run.
    """
    asked = to_plain(spec.training) | {"learning_rate": learning_rate}
    if number is not None and spec.training.span == "run":
        steps = spec.training.steps
        asked |= {"before": number * steps, "after": (spec.rounds - number - 1) * steps}
    return LocalTraining(**asked)


def perplexities(
    measured: Mapping[str, Mapping[str, Score]],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Turn {figure: {set: score}} into perplexities over all sets and per set."""
    overall: dict[str, float] = {}
    sites: dict[str, dict[str, float]] = {}
    for figure, sets in measured.items():
        overall[figure] = perplexity(sets.values())
        for name, one in sets.items():
            sites.setdefault(name, {})[figure] = perplexity([one])
    return overall, sites


def warnings(overall: dict[str, float], *, vocabulary: int | None = None) -> list[str]:
    """Say what a careful reader would object to, and which figures are not what they should be."""
    objections = []
    base, emulator = overall.get(BASE_ZERO_SHOT), overall.get(EMULATOR_ZERO_SHOT)
    if base and emulator and emulator > UNUSABLE * base:
        objections.append(
            f"the emulator is too small to be useful: its zero-shot perplexity {emulator:.0f} is "
            f"{emulator / base:.0f} times the base's {base:.1f} (limit {UNUSABLE:.0f}); keep more layers"
        )
    if odd := [name for name, value in overall.items() if not math.isfinite(value)]:
        objections.append(
            f"{', '.join(title(name) for name in odd)}: not a finite perplexity; look for NaN or infinite "
            "values in the model's weights, and at the learning rate"
        )
    plug_in = overall.get(PLUG_IN)
    if base and plug_in and plug_in >= base:
        objections.append(f"tuning did not help: plug-in perplexity {plug_in:.2f}, base zero-shot {base:.2f}")
    return objections + sentences(overall, vocabulary=vocabulary, of=overall.keys() - {*odd})


def _experts(history: History) -> dict[str, Any]:
    """Return the perplexities of each expert alone, where the plug-in is an ensemble."""
    served = history.get(evaluate(PLUG_IN))
    return {
        name: {"overall": perplexity(sets.values()), "sites": {one: perplexity([score]) for one, score in sets.items()}}
        for name, sets in (served.experts if served else {}).items()
    }


def _held_out(exam: Exam | None) -> dict[str, float]:
    """Return the perplexities of a site's held-out rows before and after it trained, as far as it told them."""
    scores = {"held_out_before": exam.before, "held_out_after": exam.after} if exam else {}
    return {name: perplexity([score]) for name, score in scores.items() if score}


def _round(number: int, history: History, accepted: list[tuple[Row, UpdateMetrics]], last: int) -> dict[str, Any]:
    version = history[fold(number + 1)]
    measured, given = plugged(history, number + 1, last=last), contributions(history, number + 1)
    sets = measured.sets if measured else {}
    return {
        "round": number + 1,
        "sites": {
            task.site: {
                "loss": metrics.loss,
                "losses": metrics.losses,
                "examples": metrics.examples,
                "weight": version.lineage[task.site].weight if task.site in version.lineage else 0.0,
                "bytes_up": task.bytes_up,
                "bytes_down": task.bytes_down,
                "engine": metrics.engine,
                "peak_memory_bytes": metrics.peak_memory_bytes,
                **_held_out(metrics.exam),
            }
            | (to_plain(given[task.site]) if task.site in given else {})
            for task, metrics in accepted
            if task.round == number
        },
        "figures": version.version.figures | ({PLUG_IN: perplexity(sets.values())} if sets else {}),
        "sets": {name: perplexity([score]) for name, score in sets.items()},  # the plug-in's, where it was measured
    }
