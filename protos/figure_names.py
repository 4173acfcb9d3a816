"""Which figures can be asked for by name. Imports nothing that the command line's help would wait for."""

from typing import Literal

Named = Literal["base_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "base_tuned", "attack"]
USUAL: Named = "plug_in"
