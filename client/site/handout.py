"""What a site was handed for a task: the emulator of the bundle, with the broadcast adapter in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.client.site.inspection import is_derived, receive, receive_anchor, strange_start
from offsite.client.site.job import TrainerJob
from offsite.emulator import bundle, methods, objectives, retention
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.precision import DTYPES
from offsite.emulator.retention import Recalling
from offsite.kernels.schema import Tensors


@dataclass(frozen=True)
class Handout:
    """An emulator that is ready to train, and what is suspicious about the adapter in it."""

    model: nn.Module
    tokenizer: Any
    method: Method
    places: dict[int, int]
    start: Adapter  # what the method and the seed give
    adapter: str  # digest of the broadcast
    broadcast: Adapter
    anchor: Tensors  # what training is held to, checked
    signs: list[str]


def load(job: TrainerJob) -> Handout:
    """Read the bundle and the broadcast; raises ValueError, and MismatchError for a tensor that is not as agreed."""
    task, dtype = job.task, DTYPES[job.task.training.precision]
    layout = bundle.described(job.manifest)
    places = layout.outline.places
    model, tokenizer = bundle.load(Path(job.bundle), layout=layout, dtype=dtype)
    method = methods.make(task.method.name, task.method.settings)
    start = method.start(model, places, seed=task.training.seed, tier=task.tier)
    broadcast, signs = _receive(job, method, start)
    attached = method.attach(model, places, broadcast)
    anchor = receive_anchor(job, method, broadcast)
    return Handout(attached, tokenizer, method, places, start, task.adapter, broadcast, anchor, signs)


def again(handout: Handout, job: TrainerJob) -> Handout:
    """Return what another task on the same bundle, of the same tier, is handed; what was trained before is gone.

    The model is the same one, which costs next to nothing, where a method's parameters are all of its adapter.
    """
    if job.task.adapter != handout.adapter:
        broadcast, signs = _receive(job, handout.method, handout.start)
        handout = replace(handout, adapter=job.task.adapter, broadcast=broadcast, signs=signs)
    live = handout.method.named_parameters(handout.model, handout.places)
    if live.keys() != handout.broadcast.keys():
        return load(job)
    with torch.no_grad():
        for key, parameter in live.items():
            parameter.copy_(handout.broadcast[key])
            parameter.grad = None
    handout.model.eval()  # as it was loaded
    return handout


@contextmanager
def referred(handout: Handout, job: TrainerJob) -> Iterator[nn.Module]:
    """Yield the emulator with the adapter that samples are referred to; what was handed out is in it again afterwards.

    An objective that compares refers to the adapter that changes nothing, a retention that recalls to an earlier one.
    Where parameters are not all of an adapter the emulator is read anew, without one that changes nothing.
    """
    adapter, attaches = _reference(handout, job)
    live = handout.method.named_parameters(handout.model, handout.places)
    if not adapter:
        yield handout.model  # which nobody asks
    elif live.keys() == adapter.keys():
        held = {key: parameter.detach().clone() for key, parameter in live.items()}
        _fill(live, adapter)
        try:
            yield handout.model
        finally:
            _fill(live, held)
    else:
        device, dtype = next(handout.model.parameters()).device, DTYPES[job.task.training.precision]
        model, _ = bundle.load(Path(job.bundle), layout=bundle.described(job.manifest), dtype=dtype)
        yield (handout.method.attach(model, handout.places, adapter) if attaches else model).to(device)


def _reference(handout: Handout, job: TrainerJob) -> tuple[Adapter, bool]:
    """Return an adapter to refer to, and whether it changes something; an empty one if nobody does."""
    spec = job.task.training
    held = retention.make(spec.retention.name, spec.retention.settings)
    if isinstance(held, Recalling):
        return held.reference(handout.anchor), True
    return (handout.start if objectives.make(spec.objective.name, spec.objective.settings).compares else {}), False


@torch.no_grad()
def _fill(live: Mapping[str, nn.Parameter], adapter: Mapping[str, torch.Tensor]) -> None:
    for key, parameter in live.items():
        parameter.copy_(adapter[key])


def _receive(job: TrainerJob, method: Method, start: Adapter) -> tuple[Adapter, list[str]]:
    """Read the broadcast, and say what is suspicious about it."""
    task = job.task
    broadcast = receive(Path(job.adapter), method, start)
    begins = task.round == 0 and task.continues is None  # all others are averages
    if not begins:
        return broadcast, []
    return broadcast, strange_start(broadcast, start, DTYPES[task.training.precision], derived=is_derived(method))
