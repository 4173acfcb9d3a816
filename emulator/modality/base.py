"""What every modality promises, and what a score is."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn


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

    def __add__(self, other: "Score") -> "Score":
        """Join the scores of two parts; raises ValueError if they are of different metrics."""
        if self.metric != other.metric:
            raise ValueError(f"a score in {self.metric} and one in {other.metric} do not add up")
        return Score(self.total + other.total, self.count + other.count, self.metric)


class Inputs(Protocol):
    """A batch of any modality."""

    modality: ClassVar[str]

    @property
    def targets(self) -> int:
        """How many things are to be predicted."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        ...


class Modality(Protocol):
    """A kind of data; its batches are `Inputs` that bear its name."""

    name: ClassVar[str]
    metric: ClassVar[str]  # of its scores

    def run(self, model: nn.Module, batch: Any, *, keep: Tensor | None = None) -> Tensor:
        """Run a batch through a model's own forward pass, as wrappers need; return the outputs, those kept if told."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean over the targets of what training lessens; raises ValueError if there is no target."""
        ...

    def score(self, model: nn.Module, batch: Any) -> Score:
        """Return the score of a batch; raises ValueError if there is no target."""
        ...
