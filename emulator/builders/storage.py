"""What builders of the stage "storage" share: which layers they pack, and how much each input of a map matters."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from offsite.emulator.activations import Map, mean_squares
from offsite.emulator.anatomy.structure import layers, linears, shape
from offsite.emulator.builders.base import Material, Separable
from offsite.emulator.formats import Format
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Draft, Outline

Which = Literal["frozen", "all"]


def chosen(outline: Outline, which: Which) -> list[int]:
    """Return the places to pack, each with parameters of its own; raises ValueError if there is none."""
    places = outline.own if which == "all" else outline.frozen
    if not places:
        raise ValueError(
            'there is nothing to pack: every layer of the emulator trains; say layers="all" to train on packed layers, '
            "as QLoRA does, or let fewer layers train"
        )
    return places


def change(builder: Separable, draft: Draft, material: Material) -> Draft:
    """Return the draft with all that a separable builder does, done here; raises ValueError."""
    weights = builder.look(draft, material)
    return builder.finish(draft, builder.encode(draft, builder.places(draft.outline), weights, material), material)


def refuse_shapes(model: nn.Module, places: Sequence[int], format: Format) -> None:
    """Raise ValueError if a map of these places does not fit a format; the model may have no weights."""
    for place in places:
        for path in linears(layers(model)[place]):
            format.shapes(*shape(layers(model)[place].get_submodule(path)))


def importance(draft: Draft, places: Sequence[int], format: Format, batches: Sequence[Batch]) -> dict[Map, Tensor]:
    """Return the mean square of each input of the maps to pack, (d_in,) fp64 on the CPU.

    A place that shares its parameters counts for the one it has them from. Raises ValueError without text, and if a map
    does not fit the format.
    """
    shared, stack = draft.outline.shared, layers(draft.model)
    refuse_shapes(draft.model, places, format)  # before the long work
    source = {place: shared.get(place, place) for place in range(len(stack))}
    inputs = {(at, path): source[at] for at in source if source[at] in places for path in linears(stack[at])}
    return mean_squares(draft.model, inputs, batches)
