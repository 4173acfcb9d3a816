"""Builders: which layers of the base an emulator has."""

from collections.abc import Mapping
from typing import Any

from offsite.emulator import family
from offsite.emulator.builders.base import Builder, Outline
from offsite.emulator.builders.crash import Crash
from offsite.emulator.builders.uniform import Uniform
from offsite.emulator.builders.whole import Whole

BUILDERS: dict[str, type[Builder]] = {Crash.name: Crash, Uniform.name: Uniform, Whole.name: Whole}

__all__ = ["BUILDERS", "Builder", "Outline", "make"]


def make(name: str, settings: Mapping[str, Any]) -> Builder:
    """Make a builder; raises ValueError on an unknown name or setting."""
    return family.make("builder", BUILDERS, name, settings)
