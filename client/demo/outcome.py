"""What a demo adds to the coordinator's report: the bound, the attacks, and its own times.

Where sites keep what they hold out, a row of the report is a site's as ever: the emulator's figures are those that it
has told, and the base's, the plug-in's, the bound's and the attack's were measured at its side.
"""

import time
from collections.abc import Mapping
from typing import Any

from offsite.client.demo.pooled import Pooled, What
from offsite.protos.documents import to_plain
from offsite.protos.figures import (
    ATTACK,
    BASE_TUNED,
    BASE_ZERO_SHOT,
    EMULATOR_TUNED,
    EMULATOR_ZERO_SHOT,
    marks,
    perplexity,
    protection,
    sentences,
)
from offsite.protos.timeline import seconds

POOLED = (BASE_TUNED, ATTACK)


def join(report: dict[str, Any], measured: Mapping[What, Pooled], *, started: float) -> None:
    """Put what was measured with all data in one place into a report; of the attacks the strongest is the figure."""
    bound, attacks = measured["bound"].scores, measured["attack"].scores
    if BASE_ZERO_SHOT in bound:
        _keep_apart(report, tokens={name: score.tokens for name, score in bound[BASE_ZERO_SHOT].items()})
    for figure, best in {**bound, ATTACK: next(iter(attacks.values()))}.items():
        for name, score in best.items():
            report["sites"][name][figure] = perplexity([score])
        report["overall"][figure] = perplexity(best.values())
    for what, pooled in measured.items():
        report["spans"] += [{"who": "demo", "step": what, **to_plain(span)} for span in pooled.spans]
    report["attacks"] = [{"name": name, "overall": perplexity(scores.values())} for name, scores in attacks.items()]
    report["protection"] = protection(
        report["overall"], list(attacks), task=True, tuned_on="the sites' data in one place"
    )
    report["marks"] = marks(report)
    report["warnings"] += sentences(report["overall"], vocabulary=report.get("vocabulary"), of=POOLED)
    report["seconds"] = seconds(report["spans"], start=started, end=time.time())


def _keep_apart(report: dict[str, Any], *, tokens: Mapping[str, int]) -> None:
    """Keep the coordinator's figures, which are of the owner's own texts, as the owner's; the rows are the sites'."""
    exam = report["exam"] or {"sites": {}, "overall": {}}
    told = (EMULATOR_ZERO_SHOT, EMULATOR_TUNED)
    report["owner"] = report["overall"]
    report["overall"] = dict(exam["overall"])
    report["sites"] = {
        name: {figure: value for figure, value in exam["sites"].get(name, {}).items() if figure in told}
        for name in tokens
    }
    report["tokens"] = dict(tokens)
