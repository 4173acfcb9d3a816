"""NF4 (Dettmers et al., arXiv 2305.14314): levels that a normal distribution fills evenly."""

from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.formats.blockwise import Blockwise
from offsite.kernels.quantise import NF4_LEVELS


@dataclass(frozen=True)
class NF4(Blockwise):
    """NF4, without the paper's second quantisation of the scales: 4.25 bits an entry at blocks of 64, not 4.13."""

    name: ClassVar[str] = "nf4"
    levels: ClassVar[tuple[float, ...]] = NF4_LEVELS
