"""Supervised training: each target is predicted, as the modality's own loss has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from offsite.emulator import modality
from offsite.emulator.examples import OddRows, Reader
from offsite.emulator.modality.base import Batch, Encoding, Modality

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Supervised:
    """Maximum likelihood of what is to be learned."""

    name: ClassVar[str] = "supervised"
    paper: ClassVar[str] = "maximum likelihood"
    compares: ClassVar[bool] = False

    def reader(self, kind: Modality) -> Reader:
        """Return the modality."""
        return kind

    def encode(
        self, kind: Modality, examples: Sequence[Any], tokenizer: Any, *, max_length: int, odd_rows: OddRows
    ) -> Encoding:
        """Encode as the modality does, long texts divided."""
        return kind.encode(examples, tokenizer, max_length=max_length, odd_rows=odd_rows)

    def refer(self, model: nn.Module, samples: Sequence[Any], *, batch_size: int) -> list[Any]:
        """Return the samples as they are."""
        return list(samples)

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of the modality's."""
        return modality.collate(samples)

    def text(self, samples: Sequence[Any]) -> Batch:
        """Make the same batch."""
        return modality.collate(samples)

    def common(self, model: nn.Module, batch: Batch) -> None:
        """Nothing: each target stands for itself."""

    def loss(self, model: nn.Module, batch: Batch, common: float = 0.0) -> Tensor:
        """Return the mean over the batch's targets."""
        return modality.loss(model, batch)
