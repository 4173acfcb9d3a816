"""What leaves a site goes through stages: each packs an update at the site, and unpacks it at the coordinator.

A chain of stages stands in the run's spec and in every task. Nothing here loads a tensor library before something is
packed, so that a site's agent can ask what the stages of a task do.
"""

from collections.abc import Sequence

from offsite.kernels.plugins import Plugins
from offsite.kernels.schema import Rule, Schema, Tensors
from offsite.protos.errors import InputError
from offsite.protos.security.draws import derive
from offsite.protos.spec import Choice
from offsite.protos.upload.base import At, Stage

__all__ = ["STAGES", "At", "Stage", "make", "pack", "schema_of", "unpack"]

STAGES: Plugins[Stage] = Plugins("stage", {"noise": "offsite.protos.upload.noise:Noise"}, group="offsite.stages")


def make(chain: Sequence[Choice]) -> list[Stage]:
    """Return the stages of a chain; raises InputError that names the known ones or the wrong setting."""
    try:
        return [STAGES.make(choice.name, choice.settings) for choice in chain]
    except ValueError as error:
        raise InputError(f"upload: {error}") from error


def schema_of(stages: Sequence[Stage], schema: Schema) -> Schema:
    """Return what leaves the site where stages are given a schema; raises ValueError where one cannot pack it."""
    for stage in stages:
        schema = stage.schema(schema)
    return schema


def pack(stages: Sequence[Stage], adapter: Tensors, broadcast: Tensors, schema: Schema, *, key: bytes) -> Tensors:
    """Pack, at the site, what an adapter has become since its broadcast; `key` is of the site and the task.

    Without stages it is the adapter itself, since the change would not give it back bit for bit.
    """
    if not stages:
        return adapter
    packed = {name: adapter[name] - broadcast[name] if _moves(schema, name) else adapter[name] for name in schema}
    for number, stage in enumerate(stages):
        packed = stage.pack(packed, At(schema, derive(key, number, stage.name)))
        schema = stage.schema(schema)
    return packed


def unpack(stages: Sequence[Stage], packed: Tensors, broadcast: Tensors, schema: Schema) -> Tensors:
    """Return, at the coordinator, the adapter as far as the stages keep it.

    Raises ValueError for tensors that no site can have packed.
    """
    if not stages:
        return packed
    schemas = [schema_of(stages[:number], schema) for number in range(len(stages))]
    for stage, given in zip(reversed(stages), reversed(schemas), strict=True):
        packed = stage.unpack(packed, At(given))
    return {name: broadcast[name] + packed[name] if _moves(schema, name) else packed[name] for name in schema}


def _moves(schema: Schema, name: str) -> bool:
    return schema[name].rule is not Rule.FIXED
