"""What a site was handed for a task: the emulator of the bundle, with the broadcast adapter in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from offsite.client.site.inspection import receive, strange_start
from offsite.client.site.job import TrainerJob
from offsite.emulator import bundle, methods
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.precision import DTYPES


@dataclass(frozen=True)
class Handout:
    """An emulator that is ready to train, and what is suspicious about the adapter in it."""

    model: nn.Module
    tokenizer: Any
    method: Method
    places: dict[int, int]
    broadcast: Adapter
    signs: list[str]


def load(job: TrainerJob) -> Handout:
    """Read the bundle and the broadcast; raises ValueError, and MismatchError for a tensor that is not as agreed."""
    task, dtype = job.task, DTYPES[job.task.training.precision]
    layout = bundle.described(job.manifest)
    places = layout.outline.places
    model, tokenizer = bundle.load(Path(job.bundle), layout=layout, dtype=dtype)
    method = methods.make(task.method.name, task.method.settings)
    start = method.start(model, places, seed=task.training.seed, tier=task.tier)
    broadcast = receive(Path(job.adapter), method, start)
    begins = task.round == 0 and task.continues is None  # all others are averages
    signs = strange_start(broadcast, start, dtype) if begins else []
    return Handout(method.attach(model, places, broadcast), tokenizer, method, places, broadcast, signs)
