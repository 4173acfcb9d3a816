"""A site's data as the rows that a task trains on: read, encoded, held against the policy, and put in their order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.client.site.job import TrainerJob
from offsite.emulator import examples
from offsite.emulator.batches import Batch, Encoded, collate, encoded, schedule


@dataclass(frozen=True)
class Rows:
    """Sequences, and which of them each step of the round sees."""

    sequences: list[Encoded]
    order: list[list[int]]
    counts: dict[str, int]  # what became of the examples, without a word of them
    warnings: list[str]

    @property
    def seen(self) -> int:
        """Number of distinct sequences in the round."""
        return len({self.sequences[row] for rows in self.order for row in rows})

    @property
    def distinct(self) -> int:
        """Number of distinct sequences at the site."""
        return len(set(self.sequences))

    def batches(self) -> Iterator[Batch]:
        """Yield the batch of each step."""
        for rows in self.order:
            yield collate([self.sequences[row] for row in rows])


def read(job: TrainerJob) -> examples.Reading:
    """Read the site's examples; raises ValueError at a fault that the policy does not let pass."""
    folders = [Path(folder) for folder in job.policy.data]
    return examples.collect(Path(job.data), folders=folders, odd_rows=job.policy.odd_rows)


def schedule_rows(job: TrainerJob, data: examples.Reading, tokenizer: Any) -> Rows:
    """Encode what was read for the emulator's tokenizer and cut this round from the endless order of a run.

    A run that goes on from another one goes on in its order.

    Raises ValueError as `read` does, and if nothing is left to learn.
    """
    spec = job.task.training
    encoding = encoded(data.examples, tokenizer, max_length=spec.max_length, odd_rows=job.policy.odd_rows)
    counts = {"examples": data.census.examples, "distinct": data.census.distinct, **encoding.counts}
    counts["left_out"] += sum(one.count for one in data.census.left_out)
    order = schedule(
        len(encoding.sequences),
        batch_size=spec.batch_size,
        steps=spec.steps,
        first_step=(job.task.rounds_before + job.task.round) * spec.steps,
        seed=spec.seed,
    )
    return Rows(encoding.sequences, order, counts, encoding.warnings)
