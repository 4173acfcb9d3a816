"""What a demo adds to the coordinator's report: the bound, the attacks, and its own times."""

import time
from collections.abc import Mapping
from typing import Any

from offsite.client.demo.pooled import Pooled, What
from offsite.protos.documents import to_plain
from offsite.protos.figures import BASE_TUNED, marks, perplexity, protection, sentences
from offsite.protos.timeline import seconds

FIGURES: dict[What, str] = {"bound": BASE_TUNED, "attack": "attack"}


def join(report: dict[str, Any], measured: Mapping[What, Pooled], *, started: float) -> None:
    """Put what was measured with all data in one place into a report; of the attacks the strongest is the figure."""
    for what, pooled in measured.items():
        figure, best = FIGURES[what], next(iter(pooled.scores.values()))
        for name, score in best.items():
            report["sites"][name][figure] = perplexity([score])
        report["overall"][figure] = perplexity(best.values())
        report["spans"] += [{"who": "demo", "step": what, **to_plain(span)} for span in pooled.spans]
    attacks = measured["attack"].scores
    report["attacks"] = [{"name": name, "overall": perplexity(scores.values())} for name, scores in attacks.items()]
    report["protection"] = protection(
        report["overall"], list(attacks), task=True, tuned_on="the sites' data in one place"
    )
    report["marks"] = marks(report)
    report["warnings"] += sentences(report["overall"], vocabulary=report.get("vocabulary"), of=FIGURES.values())
    report["seconds"] = seconds(report["spans"], start=started, end=time.time())
