"""What each site gave to the version of a round, as the steps of a run measured it."""

import math
from collections.abc import Mapping

from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.results import compare, evaluate, fold, lacking
from offsite.protos.documents import document
from offsite.protos.figures import PLUG_IN, Score, perplexity
from offsite.protos.ranges import Finite, finite


@document
class Contribution:
    """What an update was worth; a field is None where it was not measured."""

    cosine: Finite | None  # of its change with the mean of all
    gain: Finite | None  # nats a token by which the plug-in's loss is higher without it; below 0 it did harm


def contributions(history: History, number: int) -> dict[str, Contribution]:
    """Return by site what it gave in a round, counted from one; empty where the run did not ask."""
    compared = history.get(compare(number))
    if compared is None:
        return {}
    whole = history.get(evaluate(f"{PLUG_IN}:{number}")) or history.get(evaluate(PLUG_IN))
    gains: dict[str, float | None] = {}
    for site in history[fold(number)].lineage:
        without = history.get(lacking(number, site))
        if without and whole:
            gains[site] = finite(_loss(without.sets) - _loss(whole.sets))
    return {
        site: Contribution(cosine=compared.cosines.get(site), gain=gains.get(site))
        for site in history[fold(number)].lineage
    }


def _loss(sets: Mapping[str, Score]) -> float:
    """Return the loss over all sets, in nats a token; NaN where it is no finite number."""
    return math.log(perplexity(sets.values()))
