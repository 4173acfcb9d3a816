"""A part in a model: what of an attached adapter trains, at a site and at the owner alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from offsite.emulator.methods.base import Adapter, Method
from offsite.emulator.modality import Batch
from offsite.emulator.parts.base import Part, Scoring, Turn
from offsite.kernels.schema import Schema, only, settle


@dataclass(frozen=True)
class Trained:
    """What of an adapter trains in a round."""

    schema: Schema  # settled, of the groups that do
    chosen: tuple[int, ...] = ()  # what the site chose, where the part lets it

    def of(self, adapter: Adapter) -> Adapter:
        """Return the tensors of an adapter that train, and those of their groups that do not."""
        return {key: adapter[key] for key in self.schema}


def whole_schema(method: Method, start: Adapter) -> Schema:
    """Return the settled schema of all that a method has, from an adapter of the tier."""
    return settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})


def select(
    part: Part,
    schema: Schema,
    turn: Turn,
    *,
    model: nn.Module,
    places: Mapping[int, int],
    batch: Callable[[], Batch],
    agree: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> Trained:
    """Return what trains, of the settled schema of an adapter that is attached; raises ValueError as the part does.

    Args:
        part: how it is chosen.
        schema: of the whole adapter.
        turn: the site's round.
        model: what the adapter is in.
        places: place in the model -> layer of the base, of the layers that may train.
        batch: makes the first batch, for a part that looks at it.
        agree: gives processes that train together the scores of one of them.
    """
    chosen: tuple[int, ...] = ()
    if isinstance(part, Scoring):
        chosen = part.choose(schema, turn, agree(part.scores(model, places, batch(), turn)).tolist())
    return Trained(only(schema, part.groups(schema, turn, chosen)), chosen)


def freeze(parameters: Mapping[str, nn.Parameter], trained: Trained) -> dict[str, nn.Parameter]:
    """Freeze the live parameters of an adapter that do not train, have the others train, and return these, by key."""
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in trained.schema)
    return {key: parameter for key, parameter in parameters.items() if key in trained.schema}
