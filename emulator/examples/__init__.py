"""Training examples from the files a data owner already has, and what of those is left out. Loads no tensor library."""

from offsite.emulator.examples.census import Census, LeftOut
from offsite.emulator.examples.fault import Fault
from offsite.emulator.examples.files import paths
from offsite.emulator.examples.reading import Reading, collect, read
from offsite.emulator.examples.shapes import SHAPES, Example

__all__ = ["SHAPES", "Census", "Example", "Fault", "LeftOut", "Reading", "collect", "paths", "read"]
