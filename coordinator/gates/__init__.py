"""Gates: what must hold before anything of a run is published."""

from collections.abc import Sequence
from typing import Any

from offsite.coordinator.gates.base import Check, Evidence, Finding
from offsite.kernels.plugins import Plugins
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice

__all__ = ["CHECKS", "Check", "Evidence", "Finding", "make"]

CHECKS: Plugins[Check] = Plugins(
    "check",
    {
        "canary": "offsite.coordinator.gates.canary:Canary",
        "figure": "offsite.coordinator.gates.losses:Figure",
        "general": "offsite.coordinator.gates.losses:General",
        "licence": "offsite.coordinator.gates.licence:Licence",
        "refusal": "offsite.coordinator.gates.refusal:Refusal",
    },
    group="offsite.checks",
    states=("texts", "pairs", "judge"),
)


def make(gate: Sequence[Choice]) -> list[Any]:
    """Return the checks of a gate; raises InputError that names the known ones or the wrong setting."""
    try:
        return [CHECKS.make(one.name, one.settings) for one in gate]
    except ValueError as error:
        raise InputError(f"gate: {error}") from error
