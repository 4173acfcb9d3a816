"""AdamW, as torch has it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn, optim


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), with torch's default moments."""

    name: ClassVar[str] = "adamw"
    paper: ClassVar[str] = "arXiv 1711.05101"
    elementwise: ClassVar[bool] = True
    forward_only: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    aligned: ClassVar[bool] = False

    def make(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        first_step: int,
    ) -> optim.AdamW:
        """Return a fresh one, which draws nothing."""
        return optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
