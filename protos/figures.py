"""The one way in which likelihoods become the perplexities that people compare."""

import math
from collections.abc import Iterable
from typing import Any


def perplexity(sets: Iterable[dict[str, Any]]) -> float:
    """Perplexity over all tokens of several sets, each {"nll": nats, "tokens": count}; capped where floats end.

    NaN where nothing was predicted, or a likelihood is NaN.
    """
    known = list(sets)
    nll, tokens = sum(one["nll"] for one in known), sum(one["tokens"] for one in known)
    return math.exp(min(nll / tokens, 700.0)) if tokens else math.nan


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
