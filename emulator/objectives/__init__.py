"""What training lessens, and of which rows: objectives, by the names that their papers have for them."""

from offsite.emulator import catalogue, modality
from offsite.emulator.examples import OddRows, Reading, Source
from offsite.emulator.objectives.base import Objective
from offsite.kernels.plugins import Plugins

OBJECTIVES: Plugins[Objective] = catalogue.OBJECTIVES
make = OBJECTIVES.make

__all__ = ["OBJECTIVES", "Objective", "make", "read", "survey"]


def read(objective: Objective, source: Source) -> Reading:
    """Read examples of an objective; raises ValueError as `collect`, with the objectives that the rows are for."""
    try:
        return _collect(objective, source)
    except ValueError as fault:
        others = [name for name in OBJECTIVES if name != objective.name and _has(name, source)]
        if not others:
            raise
        raise ValueError(
            f"{fault}; the run's objective is {objective.name}, and the rows are for {' or '.join(others)}: ask for a "
            "run with that objective (under training), or give rows of the shape expected here"
        ) from fault


def survey(source: Source) -> tuple[Objective, Reading]:
    """Read examples for an objective that has some, where nobody says for which; raises ValueError as `collect`.

    It is one that compares answers if all rows are such, whose answers may be text to another one, and else the first.
    What is raised is about the objective of a run that names none.
    """
    for name, kind in OBJECTIVES.sound().items():
        if kind.compares and _has(name, source, odd_rows="refuse"):
            objective = OBJECTIVES.make(name, {})
            return objective, _collect(objective, source)
    faults = []
    for name in OBJECTIVES:
        objective = OBJECTIVES.make(name, {})
        try:
            return objective, _collect(objective, source)
        except ValueError as fault:
            faults.append(fault)
    raise faults[0]


def _collect(objective: Objective, source: Source, odd_rows: OddRows | None = None) -> Reading:
    return source.collect(objective.reader(modality.default()), odd_rows=odd_rows)


def _has(name: str, source: Source, odd_rows: OddRows | None = None) -> bool:
    """Tell whether an objective reads rows."""
    try:
        _collect(OBJECTIVES.make(name, {}), source, odd_rows)
    except ValueError:
        return False
    return True
