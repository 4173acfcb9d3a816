"""A site's data as the rows that a task trains on: read, encoded, held against the policy, and put in their order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.client.site.job import TrainerJob
from offsite.emulator import modality
from offsite.emulator.batches import schedule
from offsite.emulator.examples import Reading, collect
from offsite.emulator.modality import Batch, Sample


@dataclass(frozen=True)
class Rows:
    """Samples, and which of them each step of the round sees."""

    samples: list[Sample]
    order: list[list[int]]
    counts: dict[str, int]  # what became of the examples, without a word of them
    warnings: list[str]

    @property
    def seen(self) -> int:
        """Number of distinct samples in the round."""
        return len({self.samples[row] for rows in self.order for row in rows})

    @property
    def distinct(self) -> int:
        """Number of distinct samples at the site."""
        return len(set(self.samples))

    def batches(self) -> Iterator[Batch]:
        """Yield the batch of each step."""
        for rows in self.order:
            yield modality.collate([self.samples[row] for row in rows])


def read(job: TrainerJob) -> Reading:
    """Read the site's examples; raises ValueError at a fault that the policy does not let pass."""
    folders = [Path(folder) for folder in job.policy.data]
    return collect(Path(job.data), modality.default(), folders=folders, odd_rows=job.policy.odd_rows)


def schedule_rows(job: TrainerJob, data: Reading, tokenizer: Any) -> Rows:
    """Encode what was read for the emulator's tokenizer and cut this round from the endless order of a run.

    A run that goes on from another one goes on in its order.

    Raises ValueError as `read` does, and if nothing is left to learn.
    """
    spec = job.task.training
    encoding = modality.default().encode(
        data.examples, tokenizer, max_length=spec.max_length, odd_rows=job.policy.odd_rows
    )
    counts = {"examples": data.census.examples, "distinct": data.census.distinct, **encoding.counts}
    counts["left_out"] += sum(one.count for one in data.census.left_out)
    order = schedule(
        len(encoding.samples),
        batch_size=spec.batch_size,
        steps=spec.steps,
        first_step=(job.task.rounds_before + job.task.round) * spec.steps,
        seed=spec.seed,
    )
    return Rows(encoding.samples, order, counts, encoding.warnings)
