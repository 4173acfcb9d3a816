"""Builders: how an emulator is made of the base."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from offsite.emulator import plugins
from offsite.emulator.anatomy.stack import refuse_mixture, restack
from offsite.emulator.builders.additive import AdditiveCodebooks
from offsite.emulator.builders.base import STAGES, Builder, Material
from offsite.emulator.builders.crash import Crash
from offsite.emulator.builders.distilled import Distilled
from offsite.emulator.builders.loram import Loram
from offsite.emulator.builders.quantised import Quantised
from offsite.emulator.builders.sketched import Sketched
from offsite.emulator.builders.uniform import Uniform
from offsite.emulator.builders.whole import Whole
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Placement

BUILDERS: dict[str, type[Builder]] = {
    AdditiveCodebooks.name: AdditiveCodebooks,
    Crash.name: Crash,
    Distilled.name: Distilled,
    Loram.name: Loram,
    Quantised.name: Quantised,
    Sketched.name: Sketched,
    Uniform.name: Uniform,
    Whole.name: Whole,
}

__all__ = ["BUILDERS", "Builder", "Material", "check", "make", "run"]


def make(name: str, settings: Mapping[str, Any]) -> Builder:
    """Make a builder; raises ValueError on an unknown name or setting."""
    return plugins.make("builder", BUILDERS, name, settings)


def check(chain: Sequence[Builder]) -> None:
    """Raise ValueError unless the builders can follow one another."""
    if not chain:
        raise ValueError(f"an emulator needs a builder; there are {', '.join(BUILDERS)}")
    for before, after in zip(chain, chain[1:], strict=False):
        if STAGES.index(before.stage) >= STAGES.index(after.stage):
            raise ValueError(
                f"{after.name} cannot follow {before.name}: builders come in the order "
                f"{', '.join(f'{stage} ({_of(stage)})' for stage in STAGES)}, at most one of each"
            )
    names = [builder.name for builder in chain]
    if "distilled" in names and not {"crash", "uniform", "loram"} & {*names}:
        raise ValueError(
            "distilled tunes what was dropped or pruned back into shape: put crash, uniform or loram first"
        )


def run(chain: Sequence[Builder], placement: Placement, base: nn.Module, material: Material) -> Draft:
    """Build an emulator of a base, which stays as it is; raises ValueError."""
    check(chain)
    first: Any = chain[0] if chain[0].stage == "depth" else Whole()
    outline = first.outline(base, material.batches, placement)
    refuse_mixture(base, [outline.layers[place] for place in outline.own])
    draft = Draft(base, restack(base, outline.layers, outline.shared), outline)
    for builder in chain:
        if builder.stage != "depth":
            change: Any = builder
            draft = change.change(draft, material)
    return draft


def _of(stage: str) -> str:
    return " or ".join(sorted(name for name, kind in BUILDERS.items() if kind.stage == stage)) or "none"
