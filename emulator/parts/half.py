"""Half fine-tuning (Hui et al., arXiv 2404.18466): in each layer one half trains, and the other stays as it is.

Which half is drawn anew in each round. Of a layer's groups with matrices and of those with vectors alone one half each
is drawn, rounded up, so that about half of the values train; what the layers have in common is drawn likewise. Tensors
of one map that no group is made of are drawn together (`base.units`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.parts.base import Drawn, Per, Turn, by_layer, refuse_choice, units
from offsite.emulator.parts.draws import drawn
from offsite.kernels.schema import Schema, groups


@dataclass(frozen=True)
class Half(Drawn):
    """Draw one half of the groups of each layer."""

    per: Per = "round"

    name: ClassVar[str] = "half"

    def fits(self, schema: Schema) -> None:
        """Raise ValueError if no layer has two groups of one kind."""
        if all(len(kind) < 2 for kind in _kinds(schema)):
            raise ValueError(
                "part half leaves nothing out, for no layer of the adapter has two groups of tensors; use part all"
            )

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return one half of each layer's groups; raises ValueError."""
        refuse_choice(self, chosen)
        self.fits(schema)
        draw = (self.name, *turn.draw(self.per))
        return frozenset(
            group
            for kind in _kinds(schema)
            for unit in drawn(kind, (len(kind) + 1) // 2, *draw)
            for group in kind[unit]
        )


def _kinds(schema: Schema) -> list[dict[str, list[str]]]:
    """Return what halves are drawn of: each layer's units with matrices, its others, and those of no layer."""
    own, common = by_layer(schema)
    keys = groups(schema)
    matrices = {group for group in keys if any(len(schema[key].shape) > 1 for key in keys[group])}
    kinds: list[dict[str, list[str]]] = []
    for of_layer in (*own.values(), common):
        named = {unit[0] if len(unit) == 1 else name: unit for name, unit in units(schema, of_layer).items()}
        kinds.append({name: unit for name, unit in named.items() if matrices & {*unit}})
        kinds.append({name: unit for name, unit in named.items() if not matrices & {*unit}})
    return kinds
