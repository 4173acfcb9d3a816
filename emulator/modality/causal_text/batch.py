"""Sequences of tokens as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import positions, text_config
from offsite.emulator.modality.base import Batch
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens


@dataclass(frozen=True, eq=False)
class TokenBatch(Batch):
    """Token ids, attention mask and labels, each (b, t) int64, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    packing: bool = False  # whether it is run with its sequences one behind the other

    modality: ClassVar[str] = Tokens.modality

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its fields by name, without how it is run."""
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "labels")}

    def packed(self) -> "TokenBatch":
        """Have it run without padding."""
        return replace(self, packing=True)

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted; the first of a sequence never is."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def mask(self) -> Tensor:
        """Which tokens are no padding."""
        return self.attention_mask

    @property
    def samples(self) -> list[Tokens]:
        """Its sequences without their padding."""
        return [
            Tokens(tuple(ids[:length].tolist()), tuple(labels[:length].tolist()))
            for ids, labels, length in zip(self.input_ids, self.labels, self.attention_mask.sum(dim=1), strict=True)
        ]

    def disturbed(self, model: nn.Module) -> "tuple[TokenBatch, Tensor]":
        """Replace every other word, because a layer may attend to the last few words alone."""
        vocabulary = text_config(model).vocab_size
        even = torch.arange(self.input_ids.shape[1], device=self.input_ids.device) % 2 == 0
        ids = torch.where(even, (self.input_ids + vocabulary // 2) % vocabulary, self.input_ids)
        return replace(self, input_ids=ids), (~even & self.attention_mask.bool()).cpu()


def collate(samples: Sequence[Tokens]) -> TokenBatch:
    """Pad sequences on the right to the longest of them."""
    length = max(map(len, samples))

    def padded(rows: list[tuple[int, ...]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)

    ids = [one.input_ids for one in samples]
    mask = [(1,) * len(row) for row in ids]
    return TokenBatch(padded(ids, 0), padded(mask, 0), padded([one.labels for one in samples], IGNORED))


def probe(model: nn.Module, *, rows: int, length: int) -> TokenBatch:
    """Return random tokens, all of them to be predicted."""
    length = min(length, positions(model) or length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text_config(model).vocab_size, (rows, length), generator=generator)
    return TokenBatch(ids, torch.ones_like(ids), ids).to(next(model.parameters()).device)
