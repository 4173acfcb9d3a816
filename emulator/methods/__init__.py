"""Methods: what of a model is trained, and how it is written down."""

from offsite.emulator import catalogue
from offsite.emulator.methods.base import Adapter, Method
from offsite.kernels.plugins import Plugins

METHODS: Plugins[Method] = catalogue.METHODS
make = METHODS.make

__all__ = ["METHODS", "Adapter", "Method", "make"]
