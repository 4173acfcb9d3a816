"""What an emulator holds of one of the base's layers. Loads no tensor library."""

from typing import NamedTuple


class Portion(NamedTuple):
    """What an emulator holds of one of the base's layers, or of what is in none."""

    verbatim: int
    lossy: int  # stored in few bits, or tuned from the base's values
    size: int  # parameters of the base's layer
    part: str  # which rows and columns: of the same ones, two emulators hold the same parameters
