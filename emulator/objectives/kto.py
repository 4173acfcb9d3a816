"""Kahneman-Tversky optimisation: desired answers become likelier than they were, and the others less so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from offsite.emulator import modality
from offsite.emulator.examples import OddRows
from offsite.emulator.examples.fault import NO_SHAPE, Fault, quoted, strange_columns
from offsite.emulator.modality.base import Batch, Encoding, Modality
from offsite.emulator.objectives.answers import Answers, check_beta, encode, refer, resting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from offsite.emulator.objectives.comparison import Labelled

SHAPES = '{"prompt", "completion", "label"}, the first two texts or lists of turns, label true or false'
LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Kto:
    """1 - sigmoid(beta (r - z)) of a desired answer, 1 - sigmoid(beta (z - r)) of another (Ethayarajh et al., eq. 8).

    arXiv 2402.01306. r is log p - log ref of the answer, and z the mean of the same over the batch, of each prompt with
    the answer of another row, at least 0 and without a gradient. The reference is the emulator with the adapter that
    changes nothing.
    """

    beta: float = 0.1
    desirable: float = 1.0  # weight of the terms of desired answers
    undesirable: float = 1.0  # and of the others

    name: ClassVar[str] = "kto"
    paper: ClassVar[str] = "arXiv 2402.01306"
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_beta(self.beta)
        if not 0 < self.desirable <= 100 or not 0 < self.undesirable <= 100:
            raise ValueError(
                f"desirable and undesirable must be above 0 and at most 100, got {self.desirable} and "
                f"{self.undesirable}"
            )

    def reader(self, kind: Modality) -> LabelReader:
        """Return what reads labelled answers."""
        return LabelReader(kind)

    def encode(
        self, kind: Modality, examples: Sequence[Answers], tokenizer: Any, *, max_length: int, odd_rows: OddRows
    ) -> Encoding:
        """Encode answers, each beside the answer of the next row that has another; raises ValueError if none has."""
        beside = [
            Answers(one.cells, (*one.members, other), one.desirable, one.place)
            for one, other in _others(kind, examples)
        ]
        return encode(kind, beside, tokenizer, max_length=max_length, odd_rows=odd_rows)

    def refer(self, model: nn.Module, samples: Sequence[Any], *, batch_size: int) -> list[Any]:
        """Return answers with their log-likelihoods."""
        return refer(model, samples, batch_size=batch_size, objective=self.name)

    def collate(self, samples: Sequence[Any]) -> Labelled:
        """Make a batch of labelled answers."""
        from offsite.emulator.objectives.comparison import Labelled

        return Labelled.of(samples)

    def text(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of the answers."""
        return modality.collate([one.own for one in samples])

    def common(self, model: nn.Module, batch: Labelled) -> Tensor:
        """Return the mean gain of answers that belong to other prompts."""
        import torch

        with torch.no_grad():
            return batch.gain(model, 1).mean()

    def loss(self, model: nn.Module, batch: Labelled, common: float = 0.0) -> Tensor:
        """Return the mean over answers."""
        import torch

        z = max(0.0, common)
        gains = batch.gain(model, 0)  # (n,)
        desired = self.desirable * (1 - torch.sigmoid(self.beta * (gains - z)))
        other = self.undesirable * (1 - torch.sigmoid(self.beta * (z - gains)))
        return torch.where(batch.desirable, desired, other).mean()


class LabelReader:
    """Reads rows of an answer and whether it is desired."""

    shapes: ClassVar[str] = SHAPES

    def __init__(self, kind: Modality) -> None:
        self._kind = kind
        self.columns = (*kind.columns, "label")

    def example(self, row: dict[str, Any], place: str) -> Answers:
        """Make an example of a row; raises Fault."""
        cells = {name: row[name] for name in self.columns if row.get(name) is not None}
        if not {"prompt", "completion", "label"} <= cells.keys():
            raise strange_columns(row, f"for the objective {Kto.name} {SHAPES}")
        label = LABELS.get(str(cells["label"]).strip().lower())
        if label is None:
            raise Fault(NO_SHAPE, f"'label' must be true or false, found {quoted(cells['label'])}")
        own = resting(cells) | {"prompt": cells["prompt"], "completion": cells["completion"]}
        return Answers(own | {"label": label}, (self._kind.example(own, place),), label, place)


def _others(kind: Modality, examples: Sequence[Answers]) -> list[tuple[Answers, Any]]:
    """Return each example, and its prompt with the answer of the next one that has another."""
    beside = []
    for one, other in zip(
        examples, _next_that_differ([repr(one.cells["completion"]) for one in examples]), strict=True
    ):
        if other is None:
            raise ValueError("all answers are the same, and they are compared with one another; give several")
        cells = {name: value for name, value in one.cells.items() if name != "label"}
        cells["completion"] = examples[other].cells["completion"]
        beside.append((one, kind.example(cells, one.place)))
    return beside


def _next_that_differ(answers: Sequence[str]) -> list[int | None]:
    """Return of each answer the place of the next other one, the first following the last; None where all are one."""
    count = len(answers)
    following: list[int | None] = [None] * count
    for place in reversed(range(2 * count)):  # twice round, as the last ones are followed by the first
        at, after = place % count, (place + 1) % count
        following[at] = after if answers[after] != answers[at] else following[after]
    return following
