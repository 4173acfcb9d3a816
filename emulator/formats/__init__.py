"""Formats: how the matrices of an emulator are stored in few bits."""

from offsite.emulator import catalogue
from offsite.emulator.formats.base import Format, Parts
from offsite.kernels.plugins import Plugins

FORMATS: Plugins[Format] = catalogue.FORMATS
make = FORMATS.make

__all__ = ["FORMATS", "Format", "Parts", "make"]
