"""Symmetric integers of 4 bits, rounded to nearest: the baseline that other formats are held against."""

from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.formats.blockwise import Blockwise
from offsite.kernels.quantise import INT4_LEVELS


@dataclass(frozen=True)
class Int4(Blockwise):
    """Multiples -7..7 of a seventh of the block's largest magnitude."""

    name: ClassVar[str] = "int4"
    levels: ClassVar[tuple[float, ...]] = INT4_LEVELS
