"""A mixture of shards as a store of tasks: each has private shards of its own, and the common ones belong to all.

A run with a new `task` begins with fresh private shards, whose product changes nothing; those of earlier tasks are laid
by and stay as they are, bit for bit. The common shards, by which what one task learns serves the next, stay in effect.
While there are earlier tasks they move slowly: after a round of k optimiser steps, of N in the run,

    common <- D common + (1 - D) new,    D = (1 - c / N)^k

so that with c = 0 they are frozen, and then the adapters of earlier tasks answer as they always did. Each serves its
own task, made of the common shards and its private ones. (Shards: Wang et al., arXiv 2410.00938; the store is ours.)
"""

from dataclasses import replace
from typing import ClassVar

import torch

from offsite.coordinator.aggregation.base import Version
from offsite.coordinator.memory.averages import average, kept, moving
from offsite.coordinator.memory.base import Combine, Moment
from offsite.coordinator.memory.tasks import TASK, current, laid_by, learned, others
from offsite.kernels.schema import Rule, Schema, Tensors
from offsite.protos.documents import document


@document
class ShardStore:
    """Keep the private shards of each task, and let the common ones move slowly."""

    name: ClassVar[str] = "shard-store"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    accumulates: ClassVar[bool] = True
    paced: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    divides: ClassVar[bool] = True
    combine: ClassVar[Combine] = "route"
    c: float = 2.0  # how often a later task's run would replace the common shards, if its steps did not overlap

    def __post_init__(self) -> None:
        """Check the range."""
        if self.c < 0:
            raise ValueError(f"c must be at least 0, got {self.c:g}")

    def begin(self, last: Version, start: Version, schema: Schema, moment: Moment) -> Version:
        """Lay the last task's private shards by, where a run goes on with another task, and take up that one's own."""
        if not moment.before or current(last) == moment.task:
            return last
        state = laid_by(last, _private(last.adapter, schema))
        own = state.pop(TASK + moment.task, None) or _private(start.adapter, schema)
        return replace(last, adapter=_with(last.adapter, own), state=state)

    def after(self, last: Version, new: Version, schema: Schema, moment: Moment) -> Version:
        """Move the common shards by as much as a round may, and keep the private ones as they are now."""
        own, adapter = _private(new.adapter, schema), new.adapter
        if others(last):
            share = 1.0 - kept(self.c, moment)
            common = average(last.adapter, adapter, dict.fromkeys(moving(schema), share), schema)
            adapter = _with(common, own)
            new = replace(new, figures=new.figures | {"common_share": share})
        return replace(new, adapter=adapter, state=learned(last, new, moment.task, own))

    def experts(self, version: Version) -> dict[str, Tensors]:
        """Return the adapter of each task, the last one's first."""
        return {current(version) or "adapter": version.adapter} | {
            task: _with(version.adapter, own) for task, own in others(version).items()
        }


def _private(adapter: Tensors, schema: Schema) -> Tensors:
    """Return what of an adapter no two layers share."""
    return {key: adapter[key][-field.private :].clone() for key, field in schema.items() if field.private}


def _with(adapter: Tensors, own: Tensors) -> Tensors:
    """Return an adapter with other private shards."""
    return adapter | {key: torch.cat([adapter[key][: -len(rows)], rows]) for key, rows in own.items()}
