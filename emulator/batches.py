"""Which samples make which batch: for training in an endless seeded order, for evaluation by their length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from offsite.emulator.modality import Batch, Sample, collate
from offsite.emulator.seeds import generator


def schedule(count: int, *, batch_size: int, steps: int, first_step: int, seed: int) -> list[list[int]]:
    """Return which of `count` examples each step sees: a cut of one endless sequence of seeded permutations."""
    orders: dict[int, list[int]] = {}

    def at(place: int) -> int:
        epoch, offset = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=generator(seed, f"epoch {epoch}")).tolist()
        return orders[epoch][offset]

    return [
        [at(step * batch_size + row) for row in range(batch_size)] for step in range(first_step, first_step + steps)
    ]


def training_batches(
    samples: Sequence[Any],
    *,
    batch_size: int,
    steps: int,
    first_step: int,
    seed: int,
    collate: Callable[[Sequence[Any]], Batch] = collate,
) -> Iterator[Batch]:
    """Yield the batches of steps `first_step` .. `first_step + steps - 1` of the endless seeded sequence."""
    for rows in schedule(len(samples), batch_size=batch_size, steps=steps, first_step=first_step, seed=seed):
        yield collate([samples[row] for row in rows])


def evaluation_batches(samples: Sequence[Sample], *, batch_size: int) -> list[Batch]:
    """Cut samples into batches in order of their length, to pad little."""
    ordered = sorted(samples, key=len)
    return [collate(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


def longest(batches: Iterable[Batch], count: int) -> list[Batch]:
    """Return the longest samples of batches in a batch of their own: the same however they were cut before."""
    samples = [sample for batch in batches for sample in batch.samples]
    return evaluation_batches(sorted(samples, key=len)[-count:], batch_size=count)
