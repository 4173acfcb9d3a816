"""SpIEL (Ansell et al., arXiv 2401.16405): entries of the maps train; those of little use go, and others grow.

In the paper that happens every few steps, ever less of it, and by gradients that are summed up over some steps. Here a
site does it once a round, by the gradient of one batch (see `methods.grown`): what all sites have in common is then one
index a round, and what a round changes is a choice of the run's settings. Of its two ways to grow this is the first,
by accumulated gradients; the other saves memory of the optimiser's kind SM3.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offsite.emulator.methods.grown import GrownEntries
from offsite.emulator.methods.targets import Modules


@dataclass(frozen=True)
class Spiel(GrownEntries):
    """Train a `share` of each map's entries, of which a site grows the part `renewed` anew each round, or more.

    Entries that have not changed go whatever the part; in the first round, these are all.
    """

    share: float = 0.01
    renewed: float = 0.2
    modules: Modules = "all-linear"

    name: ClassVar[str] = "spiel"
    rate: ClassVar[float] = 1e-2
    paper: ClassVar[str] = "arXiv 2401.16405"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 <= self.renewed <= 1:
            raise ValueError(f"renewed is a part of the entries that train, 0 to 1; got {self.renewed}")

    def kept(self, change: Tensor) -> int:
        """Return how many have changed, but at most all without the part that is renewed."""
        return min(int(change.count_nonzero()), len(change) - round(self.renewed * len(change)))
