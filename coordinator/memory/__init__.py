"""Memories: how versions accumulate over the rounds of a run, and over runs that go on from one another."""

from typing import Any

from offsite.coordinator.memory.base import PREFIX, SUMS, Combine, Memory, Moment
from offsite.kernels.plugins import Plugins
from offsite.protos.errors import InputError

__all__ = ["MEMORIES", "PREFIX", "SUMS", "Combine", "Memory", "Moment", "make"]

MEMORIES: Plugins[Memory] = Plugins(
    "memory",
    {
        "ema": "offsite.coordinator.memory.ema:Ema",
        "grown": "offsite.coordinator.memory.grown:Grown",
        "lae": "offsite.coordinator.memory.lae:Lae",
        "none": "offsite.coordinator.memory.none:Nothing",
        "shard-store": "offsite.coordinator.memory.shard_store:ShardStore",
    },
    group="offsite.memories",
    states=("rules", "accumulates", "replaces", "divides", "combine"),
)


def make(name: str, settings: dict[str, Any]) -> Memory:
    """Return a memory by name; raises InputError that names the known ones or the wrong setting."""
    try:
        return MEMORIES.make(name, settings)
    except ValueError as error:
        raise InputError(str(error)) from error
