"""What sites have told of their held-out rows, as a report has it, and how well that foretells the plug-in."""

from collections.abc import Iterable
from typing import Any

from offsite.coordinator.runs import exams
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.judging import plugged
from offsite.coordinator.runs.steps.results import evaluate
from offsite.coordinator.store.journal import Row
from offsite.protos.exams import Gains, nats, prediction, total
from offsite.protos.figures import BASE_ZERO_SHOT, EMULATOR_TUNED, EMULATOR_ZERO_SHOT, Score, perplexity


def told(history: History, tasks: Iterable[Row], *, last: int, chosen: int) -> dict[str, Any] | None:
    """Return what sites told in a run, by its last round and the one whose version is its outcome; None: nothing.

    "sites" has each site's rows and tokens, and the perplexities of the emulator as it was first received and with the
    run's outcome in it; "overall" those of the sites that told both, by their sums; "rounds" the perplexity of the
    version that each round ended in, and how many sites measured it.
    """
    sheets = exams.sheets(tasks)
    if not sheets:
        return None
    first, tuned = sheets.get(0, {}), sheets.get(chosen, {})
    both = sorted(first.keys() & tuned.keys())
    overall = {
        EMULATOR_ZERO_SHOT: perplexity(first[site].before for site in both),
        EMULATOR_TUNED: perplexity(tuned[site].before for site in both),
    }
    return {
        "sites": {
            site: _site(site, sheets, chosen) for site in sorted({site for sheet in sheets.values() for site in sheet})
        },
        "overall": overall if both else {},
        "rounds": [
            {"round": number, "sites": len(sheet), "perplexity": perplexity(one.before for one in sheet.values())}
            for number, sheet in sorted(sheets.items())
            if number
        ],
        "prediction": prediction(list(_gains(history, sheets, last))),
    }


def _site(site: str, sheets: exams.Sheets, chosen: int) -> dict[str, Any]:
    newest = next(sheet[site] for _, sheet in sorted(sheets.items(), reverse=True) if site in sheet)
    figures = {EMULATOR_ZERO_SHOT: sheets.get(0, {}).get(site), EMULATOR_TUNED: sheets.get(chosen, {}).get(site)}
    about = {"rows": newest.rows, "tokens": newest.before.tokens, "noised": newest.noised}
    return about | {name: perplexity([exam.before]) for name, exam in figures.items() if exam}


def _gains(history: History, sheets: exams.Sheets, last: int) -> Iterable[Gains]:
    """Yield the gains of each version that both ends have measured, by the sites that measured the first one, too."""
    base = history.get(evaluate(BASE_ZERO_SHOT))
    for number in range(1, last + 1):
        measured = plugged(history, number, last=last)
        if base is None or measured is None:
            continue
        common = sorted(sheets.get(0, {}).keys() & sheets.get(number, {}).keys())
        emulator = _gain((sheets[0][site].before for site in common), (sheets[number][site].before for site in common))
        plug_in = _gain(base.sets.values(), measured.sets.values())
        if emulator is not None and plug_in is not None:
            yield Gains(round=number, emulator=emulator, plug_in=plug_in)


def _gain(before: Iterable[Score], after: Iterable[Score]) -> float | None:
    losses = nats(total(before)), nats(total(after))
    return losses[0] - losses[1] if losses[0] is not None and losses[1] is not None else None
