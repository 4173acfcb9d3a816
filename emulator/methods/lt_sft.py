"""LT-SFT, lottery-ticket sparse fine-tuning (Ansell et al., arXiv 2110.07560): the entries that matter train.

The paper fine-tunes every weight first, keeps the index of those that moved most, and trains these from the beginning.
Here a site's first pass is the gradient of one batch, at the start of a run's first round: it trains those that one
step of gradient descent would move most (see `methods.grown`). A whole training beforehand would be steps that no task
speaks of. The strategy keeps the largest entries of what the sites have made of theirs, and all train these from then
on. Not here are the paper's penalty on changes, and one threshold for all maps: each has its share.

Changes are sums: adapters of a language and of a task that were trained apart can be merged into one base, or be
composed into one adapter (`offsite.emulator.composition`).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offsite.emulator.methods.grown import GrownEntries
from offsite.emulator.methods.targets import Modules


@dataclass(frozen=True)
class LtSft(GrownEntries):
    """Train the `share` of each map's entries that the sites chose in the first round."""

    share: float = 0.01
    modules: Modules = "all-linear"

    name: ClassVar[str] = "lt-sft"
    rate: ClassVar[float] = 1e-2
    paper: ClassVar[str] = "arXiv 2110.07560"

    def kept(self, change: Tensor) -> int:
        """Return none where nothing has changed yet, else all."""
        return len(change) if bool(change.any()) else 0
