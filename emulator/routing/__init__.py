"""Telling tasks apart: which of the known tasks rows are of, whether a task is new, and how far data have drifted.

A task is known by the sums that its sites measured, by a method that tells tasks apart, all with the same settings:
`signature`, of words, or `prototype`, of hidden states. `retrieval` and `alignment` are for classes of images.
"""

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from offsite.emulator.methods.base import Adapter
from offsite.emulator.modality import Batch


@runtime_checkable
class Telling(Protocol):
    """A measuring method (`methods.base.Measuring`) whose sums tell the data of one task from another's."""

    asks_model: ClassVar[bool]  # whether a row is told by a model's hidden states, and not by itself alone

    def rows(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> dict[str, Tensor]:
        """Return what each row of a batch on the model's device gives, (b, ...) by part."""
        ...

    def parts(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's sums by part; raises ValueError unless they are of this method and these settings."""
        ...

    def likeness(self, rows: Mapping[str, Tensor], known: Mapping[str, Adapter]) -> Tensor:
        """Return (b, tasks) fp64 in -1 .. 1, how like rows are to the sums of each known task, in their order."""
        ...


def likeness(method: Telling, adapter: Adapter, known: Mapping[str, Adapter]) -> dict[str, float]:
    """Return how like the sums of a task are to those of each known one, in -1 .. 1; raises ValueError on a misfit."""
    if not known:
        return {}
    rows = {part: total[None] for part, total in method.parts(adapter).items()}
    return dict(zip(known, method.likeness(rows, known)[0].tolist(), strict=True))


def same_task(method: Telling, adapter: Adapter, known: Mapping[str, Adapter], *, threshold: float) -> str | None:
    """Return the known task that sums are most like, or None where none is as like as `threshold`: the task is new."""
    alike = likeness(method, adapter, known)
    best = max(alike, key=lambda task: alike[task], default=None)
    return best if best is not None and alike[best] >= threshold else None


def route(
    method: Telling, model: nn.Module, places: Mapping[int, int], batch: Batch, known: Mapping[str, Adapter]
) -> list[str]:
    """Return for each row of a batch the known task that it is most like; raises ValueError if none is known."""
    tasks = list(known)
    return [tasks[at] for at in _alike(method, model, places, batch, known).argmax(dim=1).tolist()]


def drift(
    method: Telling, model: nn.Module, places: Mapping[int, int], batch: Batch, known: Mapping[str, Adapter]
) -> Tensor:
    """Return (b,), how far each row is from all known tasks: 1 less its likeness to the nearest, 0 .. 2."""
    return 1 - _alike(method, model, places, batch, known).amax(dim=1)


def _alike(
    method: Telling, model: nn.Module, places: Mapping[int, int], batch: Batch, known: Mapping[str, Adapter]
) -> Tensor:
    if not known:
        raise ValueError("no task is known; measure one before rows are compared with it")
    return method.likeness(method.rows(model, places, batch), known)
