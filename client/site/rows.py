"""A site's data as the rows that a task trains on: read, encoded, held against the policy, and put in their order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from offsite.client.site import curation, reservoir
from offsite.client.site.exam import HeldOut
from offsite.client.site.job import TrainerJob
from offsite.emulator import modality, objectives, retention
from offsite.emulator.batches import schedule
from offsite.emulator.examples import Example, Reading
from offsite.emulator.modality import Batch
from offsite.emulator.objectives import Objective
from offsite.emulator.retention import Rehearsing
from offsite.emulator.retention.objective import objective_of


@dataclass(frozen=True)
class Rows:
    """Samples, and which of them each step of the round sees."""

    objective: Objective
    samples: list[Any]
    order: list[list[int]]
    counts: dict[str, int]  # what became of the examples, without a word of them
    warnings: list[str]
    own: int  # how many of the samples are of the task, and no earlier one: the first
    old: int  # how many of a step are not

    @property
    def seen(self) -> int:
        """Number of distinct samples in the round."""
        return len({self.samples[row] for rows in self.order for row in rows})

    @property
    def distinct(self) -> int:
        """Number of distinct samples of the task at the site."""
        return len(set(self.samples[: self.own]))

    @property
    def kept(self) -> int:
        """And of those that were kept of earlier ones."""
        return len(set(self.samples[self.own :]))

    def batches(self) -> Iterator[Batch]:
        """Yield the batch of each step."""
        for rows in self.order:
            yield self.objective.collate([self.samples[row] for row in rows])

    def texts(self) -> Iterator[Batch]:
        """Yield the text of each step, as a batch of the modality's."""
        for rows in self.order:
            yield self.objective.text([self.samples[row] for row in rows])

    def refer(self, model: nn.Module, *, batch_size: int) -> "Rows":
        """Return the same with what the objective asks about the samples of this round before they train a model."""
        seen = sorted({row for rows in self.order for row in rows})
        known = self.objective.refer(model, [self.samples[row] for row in seen], batch_size=batch_size)
        samples = list(self.samples)
        for row, sample in zip(seen, known, strict=True):
            samples[row] = sample
        return replace(self, samples=samples)


def read(job: TrainerJob) -> Reading:
    """Read the site's examples; raises ValueError at a fault that the policy does not let pass."""
    return objectives.read(_objective(job), job.policy.source(Path(job.data)))


def hold_out(job: TrainerJob, data: Reading, *, secret: bytes) -> tuple[Reading, HeldOut]:
    """Part what was read in what trains and what is held out, by the site's secret; raises ConflictError.

    Whether the task measures anything or not: no other one may have trained on what a later one measures.
    """
    count = job.policy.held_out
    trained, held_out = curation.hold_out(data.examples, count=count, secret=secret, known=_earlier(job))
    data = replace(data, examples=trained) if held_out else data
    return data, HeldOut(held_out, secret)


def schedule_rows(job: TrainerJob, data: Reading, tokenizer: Any) -> Rows:
    """Encode what was read for the emulator's tokenizer and cut this round from the endless order of a run.

    A run that goes on from another one goes on in its order.

    Raises ValueError as `read` does, and if nothing is left to learn.
    """
    spec = job.task.training
    objective = _objective(job)
    encoding = objective.encode(
        modality.default(), data.examples, tokenizer, max_length=spec.max_length, odd_rows=job.policy.odd_rows
    )
    counts = {"examples": data.census.examples, "distinct": data.census.distinct, **encoding.counts}
    counts["left_out"] += sum(one.count for one in data.census.left_out)
    kept = _kept(job, objective, tokenizer)
    held = retention.make(spec.retention.name, spec.retention.settings)
    old = held.rehearsed(spec.batch_size) if kept and isinstance(held, Rehearsing) else 0
    rounds, own = job.task.rounds_before + job.task.round, len(encoding.samples)
    which: dict[str, int] = {"steps": spec.steps, "first_step": rounds * spec.steps, "seed": spec.seed}
    order = schedule(own, batch_size=spec.batch_size - old, **which)
    if old:
        rehearsed = schedule(len(kept), batch_size=old, **which)
        order = [[*new, *(own + row for row in rows)] for new, rows in zip(order, rehearsed, strict=True)]
    return Rows(objective, [*encoding.samples, *kept], order, counts, encoding.warnings, own, old)


def _kept(job: TrainerJob, objective: Objective, tokenizer: Any) -> list[Any]:
    """Return the samples of rows that were kept of earlier tasks."""
    examples = _earlier(job)
    if not examples:
        return []
    return objective.encode(
        modality.default(), examples, tokenizer, max_length=job.task.training.max_length, odd_rows=job.policy.odd_rows
    ).samples


def _earlier(job: TrainerJob) -> list[Example]:
    """Return the examples of rows that were kept of earlier tasks."""
    reader = _objective(job).reader(modality.default())
    return [reader.example(row, "") for file in job.reservoirs for row in reservoir.rows(Path(file))]


def _objective(job: TrainerJob) -> Objective:
    return objective_of(job.task.training)
