"""What training lessens, and of which rows: objectives, by the names that their papers have for them."""

from collections.abc import Sequence
from pathlib import Path

from offsite.emulator import catalogue, modality
from offsite.emulator.examples import OddRows, Reading, collect
from offsite.emulator.objectives.base import Mean, Objective
from offsite.kernels.plugins import Plugins

OBJECTIVES: Plugins[Objective] = catalogue.OBJECTIVES
make = OBJECTIVES.make

__all__ = ["OBJECTIVES", "Mean", "Objective", "make", "survey"]


def survey(path: Path, *, folders: Sequence[Path] = (), odd_rows: OddRows = "skip") -> tuple[Objective, Reading]:
    """Read examples for the first objective that has some, where nobody says for which; raises ValueError as `collect`.

    What is raised is about the objective of a run that names none.
    """
    faults = []
    for name in OBJECTIVES:
        objective = OBJECTIVES.make(name, {})
        try:
            return objective, collect(path, objective.reader(modality.default()), folders=folders, odd_rows=odd_rows)
        except ValueError as fault:
            faults.append(fault)
    raise faults[0]
