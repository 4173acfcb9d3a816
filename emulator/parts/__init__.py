"""Partial training: which part of an adapter trains in a round at a site, and leaves it."""

from offsite.emulator import catalogue
from offsite.emulator.parts.base import Allotting, Part, Scoring, Turn
from offsite.kernels.plugins import Plugins

__all__ = ["PARTS", "Allotting", "Part", "Scoring", "Turn", "make"]

PARTS: Plugins[Part] = catalogue.PARTS
make = PARTS.make
