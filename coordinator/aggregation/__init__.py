"""Strategies: how the updates of a round become one."""

from typing import Any

from offsite.coordinator.aggregation.base import Aggregate, Fold, Strategy
from offsite.coordinator.aggregation.factor_mean import FactorMean
from offsite.coordinator.aggregation.low_rank import LowRank
from offsite.coordinator.aggregation.mean import Mean
from offsite.protos.documents import parse
from offsite.protos.errors import InputError

__all__ = ["STRATEGIES", "Aggregate", "Fold", "Strategy", "make"]

STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (LowRank, FactorMean, Mean)}


def make(name: str, settings: dict[str, Any]) -> Strategy:
    """Return a strategy by name; raises InputError that names the known ones or the wrong setting."""
    if name not in STRATEGIES:
        raise InputError(f"strategy: there is no {name!r}; known are {', '.join(sorted(STRATEGIES))}")
    return parse(STRATEGIES[name], settings, where=f"strategy {name}")
