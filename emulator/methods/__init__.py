"""Methods: what of a model is trained, and how it is written down."""

from collections.abc import Mapping
from typing import Any

from offsite.emulator import plugins
from offsite.emulator.methods.base import Adapter, Method
from offsite.emulator.methods.blocks import Blocks
from offsite.emulator.methods.grids import Grids
from offsite.emulator.methods.lora import Lora

METHODS: dict[str, type[Method]] = {Blocks.name: Blocks, Grids.name: Grids, Lora.name: Lora}

__all__ = ["METHODS", "Adapter", "Method", "make"]


def make(name: str, settings: Mapping[str, Any]) -> Method:
    """Make a method; raises ValueError on an unknown name or setting."""
    return plugins.make("method", METHODS, name, settings)
