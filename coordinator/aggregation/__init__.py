"""Strategies: how the updates of a round become one."""

from typing import Any

from offsite.coordinator.aggregation.base import Fold, Origin, Separable, Strategy, Version
from offsite.kernels.plugins import Plugins
from offsite.protos.errors import InputError

__all__ = ["STRATEGIES", "Fold", "Origin", "Separable", "Strategy", "Version", "make"]

STRATEGIES: Plugins[Strategy] = Plugins(
    "strategy",
    {
        "factor-mean": "offsite.coordinator.aggregation.factor_mean:FactorMean",
        "index-union": "offsite.coordinator.aggregation.index_union:IndexUnion",
        "low-rank": "offsite.coordinator.aggregation.low_rank:LowRank",
        "mean": "offsite.coordinator.aggregation.mean:Mean",
        "requantise": "offsite.coordinator.aggregation.requantise:Requantise",
        "sum": "offsite.coordinator.aggregation.sum:Sum",
        "vote": "offsite.coordinator.aggregation.vote:Vote",
    },
    group="offsite.strategies",
    states=("rules", "exact", "linear", "mixed_tiers", "needs"),
)


def make(name: str, settings: dict[str, Any]) -> Strategy:
    """Return a strategy by name; raises InputError that names the known ones or the wrong setting."""
    try:
        return STRATEGIES.make(name, settings)
    except ValueError as error:
        raise InputError(str(error)) from error
