"""What a training lessens: its objective, with what its retention has it recall."""

from collections.abc import Mapping
from typing import Any, Protocol

from offsite.emulator import objectives, retention
from offsite.emulator.objectives import Objective
from offsite.emulator.retention.base import Recalling


class Chosen(Protocol):
    """A plug-in's name and its settings."""

    @property
    def name(self) -> str:
        """That it has in its family."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """As its family checks them."""


class Training(Protocol):
    """What a run says of its local training."""

    @property
    def objective(self) -> Chosen:
        """What the steps lessen."""

    @property
    def retention(self) -> Chosen:
        """And what they are held by."""


def objective_of(training: Training) -> Objective:
    """Return what a training lessens, with what its retention has it recall; raises ValueError on what is unknown."""
    objective = objectives.make(training.objective.name, training.objective.settings)
    held = retention.make(training.retention.name, training.retention.settings)
    return held.recalled(objective) if isinstance(held, Recalling) else objective
