"""IST, importance-aware sparse tuning (Yao et al., arXiv 2410.11772): each site trains the layers that matter there.

A layer's response is what it adds to what it reads. In each trial some layers' responses are made small, a layer with a
chance sigma(I) of its score I; where the loss is low nevertheless, their scores rise. So a high score means an
unimportant layer, and those that train are drawn with a chance of sigma(-I). The paper makes the response of each
layer's adapter small, and scores and draws every few steps; here it is the response of the layer itself, which any
method's first round has, and it is once a round before the first step, so that one choice leaves the site.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from offsite.emulator.modality import Batch
from offsite.emulator.parts.base import Turn, by_layer
from offsite.emulator.parts.draws import weighted
from offsite.kernels.schema import Schema, only, size_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

TRIED = 3  # of a trial: draws whose rewards are compared
SUPPRESSED = 0.5  # share of the layers whose response a draw makes small
RATE = 10.0  # of the scores
LARGEST = 10.0  # nats a token that a draw may be better than the whole model


@dataclass(frozen=True)
class Ist:
    """Draw a share of the layers by their importance, which `trials` of three forward passes on a batch tell."""

    share: float = 0.25  # of the layers, at least one
    trials: int = 4
    response: float = 0.25  # what is left of a response that is made small

    name: ClassVar[str] = "ist"
    partial: ClassVar[bool] = True
    starts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.share < 1:
            raise ValueError(f"share must be above 0 and below 1, got {self.share}")
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if not 0 <= self.response < 1:
            raise ValueError(f"response must be at least 0 and below 1, got {self.response}")

    @property
    def alike(self) -> bool:
        """Whether all sites of a round train the same: each chooses."""
        return False

    def fits(self, schema: Schema) -> None:
        """Raise ValueError if the adapter has fewer than two layers."""
        if (count := len(by_layer(schema).own)) < 2:
            raise ValueError(f"part ist chooses among layers, and the adapter has {count}; use part all")

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return the groups of the chosen layers, and those that layers have in common; raises ValueError."""
        self.fits(schema)
        own, common = by_layer(schema)
        count = self._count(schema)
        if sorted({*chosen}) != list(chosen) or not {*chosen} <= own.keys() or len(chosen) != count:
            raise ValueError(
                f"part ist trains {count} of the layers {', '.join(map(str, own))}, in ascending order, not "
                f"{list(chosen)[:20]}"
            )
        return frozenset([*common, *(group for layer in chosen for group in own[layer])])

    def scores(self, model: "nn.Module", places: Mapping[int, int], batch: Batch, turn: Turn) -> "Tensor":
        """Return the scores of the layers after all trials, without dropout; raises ValueError without a finite loss.

        A draw's reward is how much less likely it makes a token: the exponential of the loss of the whole model less
        that of the draw, which unlike that of the loss alone does not vanish where losses are high.
        """
        from offsite.emulator.parts.responses import losses  # torch

        scores = dict.fromkeys(sorted(places.values()), 0.0)
        count = max(1, int(SUPPRESSED * len(scores)))
        at = {layer: place for place, layer in places.items()}
        (whole,) = losses(model, batch, [()], self.response)
        if not math.isfinite(whole):
            raise ValueError(f"the loss of the emulator is {whole}, so that part ist cannot tell which layers matter")
        for trial in range(self.trials):
            chances = {layer: _sigma(score) for layer, score in scores.items()}
            draws = [weighted(chances, count, self.name, "trial", trial, number, *turn) for number in range(TRIED)]
            tried = losses(model, batch, [[at[layer] for layer in draw] for draw in draws], self.response)
            rewards = [math.exp(min(whole - loss, LARGEST)) if math.isfinite(loss) else 0.0 for loss in tried]
            for draw, reward in zip(draws, rewards, strict=True):
                for layer in draw:
                    chance = chances[layer]
                    scores[layer] += RATE * (reward - sum(rewards) / TRIED) * chance * (1 - chance)
        return _tensor(list(scores.values()), model)

    def choose(self, schema: Schema, turn: Turn, scores: Sequence[float]) -> tuple[int, ...]:
        """Return the layers that train, in ascending order; raises ValueError unless each has a score."""
        own = by_layer(schema).own
        if len(scores) != len(own):
            raise ValueError(f"part ist has {len(scores)} scores, and the adapter {len(own)} layers")
        chances = {layer: _sigma(-score) for layer, score in zip(own, scores, strict=True)}
        return tuple(weighted(chances, self._count(schema), self.name, *turn))

    def largest(self, schema: Schema) -> tuple[int, ...]:
        """Return as many layers as train, those with the most bytes."""
        own = by_layer(schema).own
        sizes = {layer: size_bytes(only(schema, groups)) for layer, groups in own.items()}
        return tuple(sorted(sorted(sizes, key=lambda layer: (-sizes[layer], layer))[: self._count(schema)]))

    def _count(self, schema: Schema) -> int:
        return max(1, int(self.share * len(by_layer(schema).own)))


def _sigma(score: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, score))))


def _tensor(values: list[float], model: "nn.Module") -> "Tensor":
    import torch

    return torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
