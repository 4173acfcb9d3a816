"""Builders: how an emulator is made of the base."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from offsite.emulator import catalogue
from offsite.emulator.anatomy.stack import refuse_mixture, restack
from offsite.emulator.builders.base import STAGES, Builder, DepthBuilder, Material, Separable
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.placements import Placement
from offsite.kernels.plugins import Plugins

BUILDERS: Plugins[Builder] = catalogue.BUILDERS
make = BUILDERS.make

__all__ = [
    "BUILDERS",
    "Builder",
    "Material",
    "Separable",
    "check",
    "first",
    "make",
    "of",
    "outlined",
    "provided",
    "providers",
    "run",
    "separable",
]


def check(chain: Sequence[Builder]) -> None:
    """Raise ValueError unless the builders can follow one another."""
    if not chain:
        raise ValueError(f"an emulator needs a builder; there are {', '.join(BUILDERS)}")
    for before, after in zip(chain, chain[1:], strict=False):
        if STAGES.index(before.stage) >= STAGES.index(after.stage):
            raise ValueError(
                f"{after.name} cannot follow {before.name}: builders come in the order "
                f"{', '.join(f'{stage} ({of(stage)})' for stage in STAGES)}, at most one of each"
            )
    for at, builder in enumerate(chain):
        if missing := sorted(builder.needs - provided(chain[:at])):
            raise ValueError(f"{builder.name} needs {missing[0]}: put {providers(missing[0])} before it")


def provided(chain: Sequence[Builder]) -> frozenset[str]:
    """Return what an emulator has that a chain built, such as `outline.REDUCTION`."""
    return frozenset().union(*(builder.provides for builder in chain))


def providers(feature: str) -> str:
    """Name the builders that give an emulator what is missing."""
    return _listed(name for name, kind in BUILDERS.items() if feature in kind.provides)


def first(chain: Sequence[Builder]) -> DepthBuilder:
    """Return the builder that decides which layers stay: the chain's own, or else the one that keeps them all."""
    decides: Any = chain[0] if chain[0].stage == "depth" else make(catalogue.FIRST, {})
    chosen: DepthBuilder = decides
    return chosen


def run(chain: Sequence[Builder], placement: Placement, base: nn.Module, material: Material) -> Draft:
    """Build an emulator of a base, which stays as it is; raises ValueError."""
    check(chain)
    draft = outlined(base, first(chain).outline(base, material.batches, placement))
    for builder in chain:
        if builder.stage != "depth":
            change: Any = builder
            draft = change.change(draft, material)
    return draft


def outlined(base: nn.Module, outline: Outline) -> Draft:
    """Begin an emulator with the layers that were chosen; raises ValueError if a base's layers cannot be moved so."""
    refuse_mixture(base, [outline.layers[place] for place in outline.own])
    return Draft(base, restack(base, outline.layers, outline.shared), outline)


def separable(chain: Sequence[Builder]) -> Separable | None:
    """Return the builder of a chain whose work can be divided by places, once its layers are chosen; None: all is one.

    Before it nothing may have changed a layer, as others would then need that and not the base alone.
    """
    *before, last = chain
    return last if isinstance(last, Separable) and all(builder.stage == "depth" for builder in before) else None


def of(stage: str) -> str:
    """Name the builders of a stage."""
    return _listed(name for name, kind in BUILDERS.items() if kind.stage == stage)


def _listed(names: Iterable[str]) -> str:
    return " or ".join(sorted(names)) or "none"
