"""Formats: how the matrices of an emulator are stored in few bits."""

from collections.abc import Mapping
from typing import Any

from offsite.emulator import plugins
from offsite.emulator.formats.additive import Additive
from offsite.emulator.formats.base import Format, Parts
from offsite.emulator.formats.int4 import Int4
from offsite.emulator.formats.nf4 import NF4
from offsite.emulator.formats.sketch import Sketch

FORMATS: dict[str, type[Format]] = {Additive.name: Additive, Int4.name: Int4, NF4.name: NF4, Sketch.name: Sketch}

__all__ = ["FORMATS", "Format", "Parts", "make"]


def make(name: str, settings: Mapping[str, Any]) -> Format:
    """Make a format; raises ValueError on an unknown name or setting."""
    return plugins.make("format", FORMATS, name, settings)
