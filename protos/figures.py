"""The one way in which likelihoods become the perplexities that people compare."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from offsite.protos.documents import document
from offsite.protos.ranges import Amount, Finite


@document
class Score:
    """How well the tokens of a text were predicted."""

    nll: Finite | None  # sum of the negative log likelihoods, in nats; None: it is no finite number
    tokens: Amount


def perplexity(scores: Iterable[Score]) -> float:
    """Perplexity over all tokens of several texts; capped where floats end.

    NaN where nothing was predicted, or a likelihood is no finite number.
    """
    known = list(scores)
    nll = sum(math.nan if score.nll is None else score.nll for score in known)
    tokens = sum(score.tokens for score in known)
    return math.exp(min(nll / tokens, 700.0)) if tokens else math.nan


FAR = 2.0  # times the base's perplexity: tuning that does such harm has gone wrong
WORSE = {  # than: what training must not do, and what it means for the figure
    ("base_tuned", "base_zero_shot"): "training made the base itself worse, so this bounds nothing",
    ("emulator_tuned", "emulator_zero_shot"): "training made the emulator worse",
    ("attack", "emulator_zero_shot"): "training made the emulator worse, so this attacks nothing",
}


def doubts(row: Mapping[str, float | None], *, vocabulary: int | None = None) -> dict[str, str]:
    """Say of each perplexity of one tuning that cannot be right why not; `vocabulary` is the number of tokens."""
    known = {name: value for name, value in row.items() if value is not None}
    found = {name: "it is no finite number" for name, value in known.items() if not math.isfinite(value)}
    if vocabulary:
        found |= {
            name: f"guessing among {vocabulary:,} tokens does better"
            for name, value in known.items()
            if name not in found and value > vocabulary
        }
    for (name, than), why in WORSE.items():
        if name in known and name not in found and known[name] > known.get(than, math.inf):
            found[name] = f"{why}; a lower learning rate may help"
    base, plug_in = known.get("base_zero_shot", math.inf), known.get("plug_in", 0.0)
    if "plug_in" not in found and plug_in > FAR * base:
        found["plug_in"] = f"it is {plug_in / base:.0f} times the untuned base's; a lower learning rate may help"
    return found


def marks(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Say of each figure of a report that cannot be right why not, by place: "overall" or "sites.<name>"."""
    places = {"overall": report["overall"], **{f"sites.{name}": row for name, row in report["sites"].items()}}
    found = {place: doubts(row, vocabulary=report.get("vocabulary")) for place, row in places.items()}
    return {place: one for place, one in found.items() if one}


def sentences(found: Mapping[str, str]) -> list[str]:
    """Turn what is doubted of figures into warnings."""
    return [f"the figure '{name.replace('_', ' ')}' cannot be right: {why}" for name, why in found.items()]


def without_infinities(value: Any, place: str = "") -> tuple[Any, list[str]]:
    """Return plain data as JSON can hold it, null for infinities and NaN, and the places where these were."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, [place]
    if not isinstance(value, dict | list | tuple):
        return value, []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = {key: without_infinities(one, f"{place}.{key}".lstrip(".")) for key, one in items}
    places = [found for _, inner in parts.values() for found in inner]
    whole = {key: one for key, (one, _) in parts.items()}
    return (whole if isinstance(value, dict) else list(whole.values())), places


def protection(overall: dict[str, float]) -> dict[str, str]:
    """Say in a run's report what an attack on its emulator showed; a run states no threshold, so nothing is claimed."""
    if "attack" not in overall or "plug_in" not in overall:
        return {"label": "not protected", "reason": "no attack on the emulator was measured"}
    if not all(math.isfinite(overall[name]) and overall[name] > 0 for name in ("attack", "plug_in")):
        return {"label": "not protected", "reason": "the attack's figure or the plug-in's is no finite number"}
    margin = math.log(overall["attack"] / overall["plug_in"])
    told = f"within {margin:.2f} nats of the plug-in" if margin >= 0 else f"{-margin:.2f} nats better than the plug-in"
    return {
        "label": "not protected",
        "reason": f"no threshold was stated; with everything unfrozen the emulator comes to perplexity "
        f"{overall['attack']:.2f}, {told}",
    }
