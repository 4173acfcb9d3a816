"""Training examples from the files a data owner already has, and what of those is left out. Loads no tensor library."""

from offsite.emulator.examples.base import Example, Reader, Renaming
from offsite.emulator.examples.census import Census, LeftOut
from offsite.emulator.examples.fault import Fault
from offsite.emulator.examples.files import paths
from offsite.emulator.examples.reading import OddRows, Reading, Source, collect

__all__ = [
    "Census",
    "Example",
    "Fault",
    "LeftOut",
    "OddRows",
    "Reader",
    "Reading",
    "Renaming",
    "Source",
    "collect",
    "paths",
]
