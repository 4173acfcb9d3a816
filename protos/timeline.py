"""Accounting of wall-clock time: both ends record spans, the report adds them up without counting a moment twice."""

from collections.abc import Iterable
from typing import Any

USEFUL = ("training", "evaluation", "loading", "download")  # everything else a run does is its own overhead


def covered(spans: Iterable[dict[str, Any]], kinds: Iterable[str]) -> float:
    """Seconds during which at least one span of the given kinds was under way, in any process."""
    kinds = set(kinds)
    total, reach = 0.0, float("-inf")
    for start, end in sorted((span["start"], span["end"]) for span in spans if span["kind"] in kinds):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def seconds(spans: list[dict[str, Any]], *, start: float, end: float) -> dict[str, float]:
    """Split the time between two moments by what was done; overhead is what no useful kind covers.

    Of spans that reach beyond the two, as of a site whose clock is wrong, only what lies between them counts.
    """
    spans = [{**span, "start": max(start, span["start"]), "end": min(end, span["end"])} for span in spans]
    kinds = ("training", "evaluation", "loading", "download", "building", "transfer", "aggregation")
    total = end - start
    split = {kind: covered(spans, [kind]) for kind in kinds}
    return {"total": total, **split, "overhead": total - covered(spans, USEFUL)}
