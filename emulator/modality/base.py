"""What every modality promises, of samples, of batches and of itself, and what a score is. Loads no tensor library."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from offsite.emulator.examples import OddRows, Reader

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Piece = tuple[tuple[int, ...], bool]  # of a sample: token ids, and whether they are learned


@dataclass(frozen=True)
class Score:
    """How well a model predicts: a sum over targets, and their number. Scores of parts add up to that of the whole."""

    total: float
    count: int
    metric: str = "nll"  # of what it is the sum; "nll" is the negative log-likelihood in nats

    @property
    def mean(self) -> float:
        """The sum for each target."""
        return self.total / self.count

    @property
    def perplexity(self) -> float:
        """exp of the mean, of a negative log-likelihood; infinite where the mean is too large for a float."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    def __add__(self, other: Score) -> Score:
        """Join the scores of two parts; raises ValueError if they are of different metrics."""
        if self.metric != other.metric:
            raise ValueError(f"a score in {self.metric} and one in {other.metric} do not add up")
        return Score(self.total + other.total, self.count + other.count, self.metric)


class Sample(Protocol):
    """What a model takes of an example, or of a part of it. Equal ones have the same hash and the same repr."""

    modality: ClassVar[str]

    def __hash__(self) -> int: ...

    def __len__(self) -> int:
        """How long it is: samples of a batch are padded to the longest."""
        ...


@dataclass(frozen=True)
class Encoding:
    """Samples to learn from, and what became of the examples on the way."""

    samples: list[Any]
    counts: dict[str, int]  # the numbers alone, without a word of the data, "left_out" among them
    warnings: list[str]  # what the data's owner should know, in sentences


@dataclass(frozen=True, eq=False)
class Batch(ABC):
    """Samples together: its fields are tensors whose first axis is theirs."""

    modality: ClassVar[str]

    @property
    @abstractmethod
    def targets(self) -> int:
        """How many things are to be predicted."""

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """Which positions of the hidden states (b, t, d) are a sample's, not padding: (b, t) int64, 1 or 0."""

    @property
    @abstractmethod
    def samples(self) -> list[Any]:
        """What it was collated of."""

    @property
    def terms(self) -> int:
        """How many things the loss of an objective is the mean over: as a rule its targets."""
        return self.targets

    @property
    def last(self) -> Tensor:
        """Index (1,) of the last position, to keep of outputs that nobody reads.

        The number 1 as `logits_to_keep` would give the head a strided view, and with it a copy of its matrix a row.
        """
        return self.mask.new_tensor([self.mask.shape[1] - 1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def packed(self) -> Self:
        """Return the batch, to be run without padding where its modality can."""
        return self

    def share(self, rank: int, world: int) -> Self:
        """Return the rows of one of several processes."""
        return replace(self, **{name: tensor.tensor_split(world)[rank] for name, tensor in self.tensors.items()})


@runtime_checkable
class Likelihoods(Protocol):
    """A modality that says how likely a model finds each sample, as objectives ask that compare."""

    def likelihoods(self, model: nn.Module, batch: Any) -> Tensor:
        """Return (b,) log-likelihoods of the samples' targets, in nats, differentiable."""
        ...


@runtime_checkable
class Predictions(Protocol):
    """A modality whose targets are each one of the same outcomes, as words of a vocabulary are."""

    def predictions(self, model: nn.Module, batch: Any) -> Tensor:
        """Return (n, v) logits of a batch's targets, row by row, in fp32 and differentiable."""
        ...


@runtime_checkable
class Packs(Protocol):
    """A modality that runs samples one behind the other, on models that take them so."""

    def packs(self, model: nn.Module) -> bool:
        """Tell whether a model predicts of a packed batch what it does of one that is not."""
        ...


@runtime_checkable
class Words(Protocol):
    """A modality whose samples are sequences of token ids, by which texts are told apart."""

    def words(self, batch: Any) -> list[tuple[int, ...]]:
        """Return the token ids of each sample that it does not learn, as of a prompt; all of one that learns all."""
        ...

    def pieces(self, batch: Any) -> list[list[Piece]]:
        """Return each sample's token ids, cut where what is learned begins or ends."""
        ...


class Modality(Reader, Protocol):
    """A kind of data: it reads, encodes, collates, runs and scores. Its samples and batches bear its name."""

    name: ClassVar[str]
    metric: ClassVar[str]  # of its scores

    def encode(
        self, examples: Sequence[Any], tokenizer: Any, *, max_length: int, divide: bool = True, odd_rows: OddRows
    ) -> Encoding:
        """Encode its examples as samples of at most `max_length`, for a model with this tokenizer.

        What is longer is divided where it can be, or cut. Examples that cannot be encoded are odd rows. Raises
        ValueError at the first of these if they are to be refused, and if nothing is left to learn.
        """
        ...

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of its samples, padded to the longest of them."""
        ...

    def probe(self, model: nn.Module, *, rows: int, length: int) -> Batch:
        """Return random samples of at most a length that the model takes, on its device: the same ones always."""
        ...

    def disturb(self, model: nn.Module, batch: Any) -> tuple[Batch, Tensor]:
        """Return the batch with every other position replaced, and a mask (b, t) of those between, on the CPU."""
        ...

    def run(self, model: nn.Module, batch: Any, *, keep: Tensor | None = None) -> Tensor:
        """Run a batch through a model's own forward pass, as wrappers need; return the outputs, those kept if told."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean over the targets of what training lessens; raises ValueError if there is no target."""
        ...

    def score(self, model: nn.Module, batch: Any) -> Score:
        """Return the score of a batch; raises ValueError if there is no target."""
        ...
