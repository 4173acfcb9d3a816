"""What leaves a site goes through stages: each packs an update at the site, and unpacks it at the coordinator.

A chain of stages stands in the run's spec and in every task. Nothing here loads a tensor library before something is
packed, so that a site's agent can ask what the stages of a task do.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from offsite.kernels.plugins import Plugins
from offsite.kernels.schema import FLOATS, Rule, Schema, TensorMap, Tensors, groups
from offsite.protos.errors import InputError
from offsite.protos.security.draws import derive
from offsite.protos.spec import Choice
from offsite.protos.upload.base import At, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STAGES", "At", "Packed", "Stage", "make", "pack", "residual_of", "schema_of", "unpack"]

STAGES: Plugins[Stage] = Plugins("stage", {"noise": "offsite.protos.upload.noise:Noise"}, group="offsite.stages")


def make(chain: Sequence[Choice]) -> list[Stage]:
    """Return the stages of a chain; raises InputError that names the known ones or the wrong setting."""
    try:
        return [STAGES.make(choice.name, choice.settings) for choice in chain]
    except ValueError as error:
        raise InputError(f"upload: {error}") from error


def _parts(stages: Sequence[Stage], schema: Schema) -> Iterator[list[Schema]]:
    """Yield for what is packed together, a group or all, its schema before each stage and after the last."""
    whole = any(stage.whole for stage in stages)
    for keys in [list(schema)] if whole else groups(schema).values():
        part = {key: schema[key] for key in keys}
        yield list(accumulate(stages, lambda schema, stage: stage.schema(schema), initial=part))


def schema_of(stages: Sequence[Stage], schema: Schema) -> Schema:
    """Return what leaves the site where stages are given a schema; raises ValueError where one cannot pack it."""
    packed: Schema = {}
    for *_, last in _parts(stages, schema):
        if both := packed.keys() & last.keys():
            raise ValueError(f"two groups are packed into one tensor {min(both)}; a stage names what it makes by group")
        packed |= last
    stays = residual_of(stages, schema)
    for number, stage in enumerate(stages):
        if stage.feedback and not any(key.startswith(_residual(number, "")) for key in stays):
            raise ValueError(
                f"stage {stage.name} is to feed back what it leaves out, but none of what it is given has the same "
                "entries in every round; put it before the stages that choose entries"
            )
    return packed


def residual_of(stages: Sequence[Stage], schema: Schema) -> Schema:
    """Return what stays at the site where stages are given a schema: what they leave out and feed back."""
    return {
        _residual(number, key): schemas[number][key]
        for schemas in _parts(stages, schema)
        for number, stage in enumerate(stages)
        if stage.feedback
        for key in _lasting(schemas[number])
    }


class Packed(NamedTuple):
    """A group of an update, or all of it."""

    update: Tensors  # what leaves the site
    residual: Tensors  # what stays


def pack(
    stages: Sequence[Stage],
    adapter: TensorMap,
    broadcast: TensorMap,
    schema: Schema,
    *,
    key: bytes,
    residual: TensorMap = MappingProxyType({}),
) -> Iterator[Packed]:
    """Pack, at the site, what an adapter has become since its broadcast, a group of a settled schema at a time.

    Without stages it is the adapter itself, since the change would not give it back bit for bit; and so are, of sparse
    matrices, the values, for those of two indices have no difference, and bits and codes. `key` is of the site and
    the task; `residual` is what stayed of the last update.
    """
    for schemas in _parts(stages, schema):
        part = {name: adapter[name] for name in schemas[0]}
        if stages:
            part |= {name: part[name] - broadcast[name] for name in _changing(schemas[0])}
        rest: Tensors = {}
        for number, (stage, fields) in enumerate(zip(stages, schemas, strict=False)):
            names = {name: _residual(number, name) for name in _lasting(fields)} if stage.feedback else {}
            part = part | {name: part[name] + residual[kept] for name, kept in names.items() if kept in residual}
            packed = stage.pack(part, At(fields, derive(key, number, stage.name)))
            if names:
                back = stage.unpack(packed, At(fields))
                rest |= {kept: part[name] - back[name] for name, kept in names.items()}
            part = packed
        yield Packed(part, rest)


def unpack(stages: Sequence[Stage], packed: TensorMap, broadcast: TensorMap | None, schema: Schema) -> TensorMap:
    """Return, at the coordinator, the adapter of a settled schema as far as the stages keep it.

    Without a broadcast it is the change, where there are stages, but of sparse matrices. What is packed together is
    unpacked when one of its tensors is asked for, and kept until one of others is. That raises ValueError for tensors
    that no site can have packed.
    """
    return _Unpacked(stages, packed, broadcast, schema) if stages else packed


class _Unpacked(Mapping[str, "Tensor"]):
    def __init__(self, stages: Sequence[Stage], packed: TensorMap, broadcast: TensorMap | None, schema: Schema) -> None:
        self._stages, self._packed, self._broadcast = stages, packed, broadcast
        self._parts = {name: schemas for schemas in _parts(stages, schema) for name in schemas[0]}
        self._part: Tensors = {}

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self._part:
            self._part = {}  # before the next is made
            self._part = self._unpack(self._parts[name])
        return self._part[name]

    def _unpack(self, schemas: list[Schema]) -> Tensors:
        part = {name: self._packed[name] for name in schemas[-1]}
        for stage, fields in zip(reversed(self._stages), reversed(schemas[:-1]), strict=True):
            part = stage.unpack(part, At(fields))
        if self._broadcast is None:
            return part
        return part | {name: self._broadcast[name] + part[name] for name in _changing(schemas[0])}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


_WHOLE = (Rule.FIXED, Rule.UNION, Rule.VOTE, Rule.REQUANTISE)  # of which no difference leaves, but the tensor


def _changing(schema: Schema) -> list[str]:
    """Return the tensors of which stages are given the change."""
    return [key for key, field in schema.items() if field.rule not in _WHOLE]


def _lasting(schema: Schema) -> list[str]:
    """Return the tensors whose entries are the same ones in each round, so that what is left out can be added."""
    return [key for key in _changing(schema) if schema[key].dtype in FLOATS and schema[key].rule is not Rule.LOCAL]


def _residual(number: int, name: str) -> str:
    """Name what a stage leaves out of a tensor."""
    return f"{number}.{name}"
