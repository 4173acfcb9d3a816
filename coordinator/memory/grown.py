"""An adapter for each task, as LDA has one for each language: what was learned before is never written over.

A run with a new `task` begins an adapter of its own, as the method begins or where the last task ended. All others stay
as they were, bit for bit, and a run with the task of one of them goes on from that, with what its sites start from.
Each serves its own task.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from offsite.coordinator.aggregation.base import Version
from offsite.coordinator.memory.base import Combine, Moment
from offsite.coordinator.memory.tasks import TASK, current, laid_by, learned, others
from offsite.kernels.schema import Rule, Schema, Tensors
from offsite.protos.documents import document

ADAPTER, START = "adapter/", "start."  # so the keys begin of a task's adapter, and of what a tier starts from


@document
class Grown:
    """Keep one adapter for each task."""

    name: ClassVar[str] = "grown"
    rules: ClassVar[frozenset[Rule]] = frozenset(Rule)
    accumulates: ClassVar[bool] = True
    paced: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    divides: ClassVar[bool] = False
    combine: ClassVar[Combine] = "route"
    origin: Literal["start", "last"] = "start"  # of a new task's adapter: the method's, or what the last task ended in

    def begin(self, last: Version, start: Version, schema: Schema, moment: Moment) -> Version:
        """Lay the last task's adapter by, where a run goes on with another task, and take up that one's own."""
        if not moment.before or current(last) == moment.task:
            return last
        state = laid_by(last, _packed(last))
        if (own := state.pop(TASK + moment.task, None)) is not None:
            return replace(_unpacked(own), state=state)
        return replace(start if self.origin == "start" else last, state=state)

    def after(self, last: Version, new: Version, schema: Schema, moment: Moment) -> Version:
        """Keep the adapters of the other tasks as they are."""
        return replace(new, state=learned(last, new, moment.task, new.adapter))

    def experts(self, version: Version) -> dict[str, Tensors]:
        """Return the adapter of each task, the last one's first."""
        return {current(version) or "adapter": version.adapter} | {
            task: _unpacked(kept).adapter for task, kept in others(version).items()
        }


def _packed(version: Version) -> Tensors:
    """Return a version's adapter, and what the sites of each tier start from, as one set of tensors."""
    parts = {ADAPTER: version.adapter} | {f"{START}{tier}/": sent for tier, sent in version.broadcast.items()}
    return {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}


def _unpacked(kept: Tensors) -> Version:
    """Return the version that was packed; tensors of no tier are its adapter's."""
    parts: dict[str, Tensors] = {}
    for name, tensor in kept.items():
        prefix, _, key = name.partition("/")
        parts.setdefault(prefix, {})[key] = tensor
    adapter = parts.pop(ADAPTER.removesuffix("/"))
    return Version(adapter, {prefix.removeprefix(START): sent for prefix, sent in parts.items()})
