"""The one way in which likelihoods become the perplexities that people compare."""

import math
from collections.abc import Iterable
from typing import Any


def perplexity(sets: Iterable[dict[str, Any]]) -> float:
    """Perplexity over all tokens of several sets, each {"nll": nats, "tokens": count}; capped where floats end."""
    nll, tokens = (sum(column) for column in zip(*((one["nll"], one["tokens"]) for one in sets), strict=True))
    return math.exp(min(nll / tokens, 700.0))


def protection(overall: dict[str, float]) -> dict[str, str]:
    """Say in a run's report what an attack on its emulator showed; a run states no threshold, so nothing is claimed."""
    if "attack" not in overall or "plug_in" not in overall:
        return {"label": "not protected", "reason": "no attack on the emulator was measured"}
    margin = math.log(overall["attack"] / overall["plug_in"])
    told = f"within {margin:.2f} nats of the plug-in" if margin >= 0 else f"{-margin:.2f} nats better than the plug-in"
    return {
        "label": "not protected",
        "reason": f"no threshold was stated; with everything unfrozen the emulator comes to perplexity "
        f"{overall['attack']:.2f}, {told}",
    }
