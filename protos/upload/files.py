"""Updates as files: the adapter that one stands for, a group of its tensors in memory at a time."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from offsite.kernels.schema import Codes, Entries, Field, Rule, Schema, TensorMap, codes, entries, settle, votes
from offsite.protos import tensors, upload
from offsite.protos.upload.base import Stage


class Reach(NamedTuple):
    """How far an update goes from its broadcast: the L2 norm of the change of values, and how many bits differ."""

    values: float
    bits: int = 0  # of those that are voted on

    @property
    def norm(self) -> float:
        """Both together, a bit that differs being a change of one."""
        return math.hypot(math.sqrt(self.bits), self.values)


@contextmanager
def opened(update: Path, broadcast: Path, schema: Schema, stages: Sequence[Stage]) -> Iterator[TensorMap]:
    """Open an update as the adapter that it stands for; a tensor that no site can have packed raises ValueError."""
    with tensors.reading(update) as packed, tensors.reading(broadcast) as start:
        yield upload.unpack(stages, packed, start, settled(schema, broadcast))


def distance(update: Path, broadcast: Path, schema: Schema, stages: Sequence[Stage]) -> float:
    """L2 norm, over all tensors, of how far an update goes from its broadcast; raises ValueError as above."""
    with tensors.reading(update) as packed, tensors.reading(broadcast) as start:
        return reach(packed, start, settled(schema, broadcast), stages).norm


def reach(packed: tensors.Source, start: tensors.Source, schema: Schema, stages: Sequence[Stage]) -> Reach:
    """Return the same distance, whatever an update of a settled schema is read from.

    Of what a union averages it is that of the matrices: an entry that one has and the other has not counts as zero. Of
    codes it is that of the values that they stand for.
    """
    matrices, bits, coded = entries(schema), votes(schema), codes(schema)
    change = upload.unpack(stages, packed, None, schema)
    if stages:
        ruled = (Rule.FIXED, Rule.UNION, Rule.VOTE, Rule.REQUANTISE)
        norms = [tensors.norm(change[name]) for name, field in schema.items() if field.rule not in ruled]
        flips = [tensors.flips(tensors.Held({name: change[name]}), start, name) for name in bits]
    else:
        apart = bits.keys() | {key for pair in (*matrices.values(), *coded.values()) for key in pair}
        norms = [tensors.gap(packed, start, packed.keys() - apart)]
        flips = [tensors.flips(packed, start, name) for name in bits]
    norms += [_apart(change, start, pair) for pair in matrices.values()]
    norms += [_recoded(change, start, pair, schema[pair.codes]) for pair in coded.values()]
    return Reach(math.hypot(*norms), sum(flips))


def _apart(one: TensorMap, other: TensorMap, pair: Entries) -> float:
    """Return how far two sparse matrices are apart; raises ValueError for an index that does not rise."""
    from offsite.kernels.sparse import Vector, distance  # where no matrix is sparse, none is loaded

    return distance(Vector(one[pair.at], one[pair.values]), Vector(other[pair.at], other[pair.values]))


def _recoded(one: TensorMap, other: TensorMap, pair: Codes, field: Field) -> float:
    """Return how far the values are apart that two tensors of codes stand for."""
    from offsite.kernels.coded import decode, read  # where nothing is in few bits, none is loaded

    values = [
        decode(read(source[pair.codes], source[pair.line], field.trained, field.width), field.width)
        for source in (one, other)
    ]
    return tensors.norm(values[0] - values[1])


def settled(schema: Schema, broadcast: Path) -> Schema:
    """Return a schema, or a part of one, with the sizes of a broadcast; raises ValueError if one does not fit."""
    entries = tensors.header(broadcast).items()
    return settle(schema, {name: entry.shape for name, entry in entries if name in schema})
