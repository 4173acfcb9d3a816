"""SaRA (Hu et al., arXiv 2409.06633): the weights nearest to zero train, for a model has least use for them.

They are chosen in each map by itself, so that what trains in a layer does not depend on which others do; the paper has
one threshold for all. Magnitudes are compared in bfloat16: a copy of the model of 16 bits gives the same entries.

Two parts of the paper are not here. Its penalty on the nuclear norm of one map's trained weights a step is a loss of
its own, and what a site minimises is the loss of its text. Nor are entries chosen anew half-way, without those that
have grown: the index is the same in all rounds, which makes the mean over sites exact.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from offsite.emulator.formats.packed import PackedLinear, dense
from offsite.emulator.methods.base import Place
from offsite.emulator.methods.entries import SparseEntries
from offsite.emulator.methods.targets import Modules
from offsite.emulator.outline import PACKED
from offsite.kernels.sparse import smallest


@dataclass(frozen=True)
class Sara(SparseEntries):
    """Train the `share` of each map's entries that is nearest to zero: "28.self_attn.q_proj.index", ".change"."""

    share: float = 0.02
    modules: Modules = "all-linear"

    name: ClassVar[str] = "sara"
    spares: ClassVar[frozenset[str]] = frozenset({PACKED})
    rate: ClassVar[float] = 1e-2
    paper: ClassVar[str] = "arXiv 2409.06633"
    seeded: ClassVar[bool] = False

    def select(self, place: Place, linear: nn.Module, count: int, *, seed: int) -> Tensor:
        """Return the smallest; raises ValueError if the map is stored in few bits, where many are equal."""
        if isinstance(linear, PackedLinear):
            raise ValueError(
                f"{place.layer}.{place.path} is stored in few bits, which do not tell its smallest weights; choose "
                "another method"
            )
        return smallest(dense(linear).to(torch.bfloat16).abs().flatten(), count).cpu()
