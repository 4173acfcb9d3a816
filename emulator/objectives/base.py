"""What an objective offers, from rows to a loss. Loads no tensor library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from offsite.emulator.examples import OddRows, Reader
from offsite.emulator.modality.base import Batch, Encoding, Modality

if TYPE_CHECKING:
    from torch import Tensor, nn


class Objective(Protocol):
    """What training lessens; its fields are its settings. It makes its samples and batches of a modality's."""

    name: ClassVar[str]
    paper: ClassVar[str]  # where it is from, such as "arXiv 2305.18290"
    compares: ClassVar[bool]  # whether its rows are answers to compare, and no text to predict

    def reader(self, kind: Modality) -> Reader:
        """Return what reads its rows, which are made of a modality's."""
        ...

    def encode(
        self, kind: Modality, examples: Sequence[Any], tokenizer: Any, *, max_length: int, odd_rows: OddRows
    ) -> Encoding:
        """Encode its examples as samples; raises ValueError as `Modality.encode` does."""
        ...

    def refer(self, model: nn.Module, samples: Sequence[Any], *, batch_size: int) -> list[Any]:
        """Return samples with what is known of them before training, by a model in which the adapter changes nothing.

        Raises ValueError for samples of another objective.
        """
        ...

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of its samples."""
        ...

    def text(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of the modality's of samples, for whoever looks at what a model makes of a site's text."""
        ...

    def common(self, model: nn.Module, batch: Any) -> Tensor | None:
        """Return what the loss of each row takes from all of them, a mean over `terms`, without a gradient.

        None if it takes nothing. The mean over a batch is the weighted one over its parts.
        """
        ...

    def loss(self, model: nn.Module, batch: Any, common: float = 0.0) -> Tensor:
        """Return the mean over a batch's `terms`, differentiable; it may be a part of a larger one with this common."""
        ...
