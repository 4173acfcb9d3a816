"""Answers that are compared: as examples, as samples, and with what the untrained model says of them.

Loads no tensor library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from offsite.emulator.examples import Fault, OddRows
from offsite.emulator.examples.census import Counter
from offsite.emulator.modality.base import Encoding, Modality, Sample

if TYPE_CHECKING:
    from torch import nn

EQUAL = "rows with nothing to compare"
SEVERAL = "rows with several sequences for an answer"
KEPT = ("system", "tools")  # columns that go with any answer
MOST_BETA = 1000.0


@dataclass(frozen=True)
class Answers:
    """An example: a row, and what a modality makes of each of its answers."""

    cells: dict[str, Any]
    members: tuple[Any, ...]
    desirable: bool = True
    place: str = field(default="", compare=False, repr=False)

    @property
    def row(self) -> dict[str, Any]:
        """The example as a row that is read as the same."""
        return self.cells

    @property
    def asked(self) -> str:
        """What the first of its answers answers."""
        return str(self.members[0].asked)

    @property
    def characters(self) -> int:
        """How long it is."""
        return sum(member.characters for member in self.members)


@dataclass(frozen=True)
class Comparison:
    """A sample: two of a modality's, and what the model says of them before it is trained, in nats."""

    own: Sample
    other: Sample
    desirable: bool = True
    reference: tuple[float, float] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        """How long the longer one is."""
        return max(len(self.own), len(self.other))


def check_beta(beta: float) -> None:
    """Raise ValueError for a strength of the reference that is none."""
    if not 0 < beta <= MOST_BETA:
        raise ValueError(f"beta must be above 0 and at most {MOST_BETA:g}, got {beta}")


def resting(cells: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that go with each of its answers."""
    return {name: cells[name] for name in KEPT if name in cells}


def encode(
    kind: Modality, examples: Sequence[Answers], tokenizer: Any, *, max_length: int, odd_rows: OddRows
) -> Encoding:
    """Encode examples of two members as comparisons; raises ValueError if nothing is left, or at an odd row."""
    samples: list[Comparison] = []
    counter, cut, without_target = Counter(), 0, 0
    for example in examples:
        try:
            members = [_sequence(kind, one, tokenizer, max_length) for one in example.members]
        except Fault as fault:
            placed = fault if fault.place or not example.place else fault.at(example.place)
            if odd_rows == "refuse":
                raise placed from None
            counter.leave_out(placed)
            continue
        cut += sum(counts.get("cut", 0) for _, counts in members)
        own, other = (sample for sample, _ in members)
        if own is None or other is None:
            without_target += 1
        else:
            samples.append(Comparison(own, other, example.desirable))
    left_out = counter.census.left_out
    if not samples:
        first = f"; {left_out[0].first}" if left_out else ""
        raise ValueError(
            f"none of the {len(examples)} examples has two answers to learn from within {max_length} tokens; allow "
            f"longer sequences or shorten the prompts{first}"
        )
    warnings = [f"left out {one.count:,} {one.reason}; first {one.first}" for one in left_out]
    if without_target:
        warnings.append(
            f"{without_target:,} of {without_target + len(samples):,} comparisons have an answer with nothing to learn "
            "within max_length and are dropped: their prompts are too long"
        )
    counts = {"sequences": len(samples), "divided": 0, "cut": cut, "without_target": without_target}
    return Encoding(samples, counts | {"left_out": sum(one.count for one in left_out)}, warnings)


def _sequence(kind: Modality, example: Any, tokenizer: Any, max_length: int) -> tuple[Any, dict[str, int]]:
    """Encode one answer; None where nothing of it is left to learn. Raises Fault for an odd one."""
    try:
        encoding = kind.encode([example], tokenizer, max_length=max_length, divide=False, odd_rows="refuse")
    except Fault:
        raise
    except ValueError:  # nothing is left
        return None, {}
    if len(encoding.samples) != 1:
        raise Fault(SEVERAL, "the tokenizer's chat template makes several sequences of an answer")
    return encoding.samples[0], encoding.counts


def refer(model: nn.Module, samples: Sequence[Any], *, batch_size: int, objective: str) -> list[Comparison]:
    """Return comparisons with the log-likelihoods of their members by a model, without dropout; each is computed once.

    Raises ValueError for samples that are no comparisons.
    """
    import torch

    from offsite.emulator import modality

    if not all(isinstance(sample, Comparison) for sample in samples):
        raise ValueError(f"the objective {objective} trains on answers that are compared, and these samples are text")
    distinct = sorted(dict.fromkeys(_members(samples)), key=len)
    device, training = next(model.parameters()).device, model.training
    known: dict[Any, float] = {}
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(distinct), batch_size):
                part = distinct[start : start + batch_size]
                batch = modality.collate(part).to(device)
                known |= zip(part, modality.likelihoods(model, batch).tolist(), strict=True)
    finally:
        model.train(training)
    return [replace(one, reference=(known[one.own], known[one.other])) for one in samples]


def _members(samples: Sequence[Comparison]) -> Iterator[Sample]:
    for one in samples:
        yield one.own
        yield one.other
