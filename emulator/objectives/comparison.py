"""Comparisons as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.modality.base import Batch
from offsite.emulator.objectives.answers import Comparison


@dataclass(frozen=True, eq=False)
class Comparisons(Batch):
    """n comparisons: the 2n rows of a modality's batch, the two of each one after the other.

    `reference` (n, 2) fp32 is the log-likelihood of each by the untrained model, and `desirable` (n,) bool is whether
    the first of the two is desired.
    """

    rows: Batch
    reference: Tensor
    desirable: Tensor

    @classmethod
    def of(cls, samples: Sequence[Comparison]) -> Self:
        """Make a batch of samples; raises ValueError where nothing was said of one before training."""
        if any(one.reference is None for one in samples):
            raise ValueError("a comparison has no reference: what the untrained model says of it is not known")
        return cls(
            modality.collate([member for one in samples for member in (one.own, one.other)]),
            torch.tensor([one.reference for one in samples], dtype=torch.float32),
            torch.tensor([one.desirable for one in samples]),
        )

    @property
    def targets(self) -> int:
        """Number of things that are predicted in both of each."""
        return self.rows.targets

    @property
    def terms(self) -> int:
        """Number of comparisons."""
        return len(self.desirable)

    @property
    def mask(self) -> Tensor:
        """That of all rows."""
        return self.rows.mask

    @property
    def samples(self) -> list[Any]:
        """The comparisons."""
        members = self.rows.samples
        marks = zip(members[::2], members[1::2], self.desirable.tolist(), self.reference.tolist(), strict=True)
        return [Comparison(own, other, desired, (a, b)) for own, other, desired, (a, b) in marks]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of its rows, the reference and the labels."""
        return {**self.rows.tensors, "reference": self.reference, "desirable": self.desirable}

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return replace(
            self,
            rows=self.rows.to(device),
            reference=self.reference.to(device),
            desirable=self.desirable.to(device),
        )

    def packed(self) -> Self:
        """Have its rows run without padding."""
        return replace(self, rows=self.rows.packed())

    def share(self, rank: int, world: int) -> Self:
        """Return the comparisons of one of several processes."""
        rows = {
            name: _split(tensor.view(-1, 2, *tensor.shape[1:]), rank, world)
            for name, tensor in self.rows.tensors.items()
        }
        return replace(
            self,
            rows=replace(self.rows, **{name: tensor.flatten(0, 1) for name, tensor in rows.items()}),
            reference=_split(self.reference, rank, world),
            desirable=_split(self.desirable, rank, world),
        )

    def member(self, which: int) -> Batch:
        """Return the first (0) or the second (1) of each as a batch of the modality's."""
        return replace(self.rows, **{name: tensor[which::2] for name, tensor in self.rows.tensors.items()})


@dataclass(frozen=True, eq=False)
class Pairs(Comparisons):
    """Pairs of a chosen answer and a rejected one; both train."""

    def gains(self, model: nn.Module) -> Tensor:
        """Return (n, 2) log-likelihoods less the reference's, in one forward pass."""
        return modality.likelihoods(model, self.rows).view(-1, 2) - self.reference


@dataclass(frozen=True, eq=False)
class Labelled(Comparisons):
    """Answers, each beside one that belongs to another prompt; the first of each trains."""

    @property
    def targets(self) -> int:
        """Number of things that are predicted in the first of each."""
        return self.member(0).targets

    def gain(self, model: nn.Module, which: int) -> Tensor:
        """Return (n,) log-likelihoods of the first or the second of each less the reference's."""
        return modality.likelihoods(model, self.member(which)) - self.reference[:, which]


def _split(tensor: Tensor, rank: int, world: int) -> Tensor:
    return tensor.tensor_split(world)[rank]
