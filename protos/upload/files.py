"""Updates as files: the adapter that one stands for, a group of its tensors in memory at a time."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offsite.kernels.schema import Rule, Schema, TensorMap, settle
from offsite.protos import tensors, upload
from offsite.protos.upload.base import Stage


@contextmanager
def opened(update: Path, broadcast: Path, schema: Schema, stages: Sequence[Stage]) -> Iterator[TensorMap]:
    """Open an update as the adapter that it stands for; a tensor that no site can have packed raises ValueError."""
    with tensors.reading(update) as packed, tensors.reading(broadcast) as start:
        yield upload.unpack(stages, packed, start, _settled(schema, broadcast))


def distance(update: Path, broadcast: Path, schema: Schema, stages: Sequence[Stage]) -> float:
    """L2 norm, over all tensors, of how far an update goes from its broadcast; raises ValueError as above."""
    with tensors.reading(update) as packed, tensors.reading(broadcast) as start:
        return reach(packed, start, _settled(schema, broadcast), stages)


def reach(packed: tensors.Source, start: tensors.Source, schema: Schema, stages: Sequence[Stage]) -> float:
    """Return the same distance, whatever an update of a settled schema is read from."""
    if not stages:
        return tensors.gap(packed, start)
    change = upload.unpack(stages, packed, None, schema)
    return math.hypot(*(tensors.norm(change[name]) for name in change if schema[name].rule is not Rule.FIXED))


def _settled(schema: Schema, broadcast: Path) -> Schema:
    return settle(schema, {name: entry.shape for name, entry in tensors.header(broadcast).items()})
