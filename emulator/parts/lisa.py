"""LISA (Pan et al., arXiv 2403.17919): few layers at a time train whole, drawn anew again and again.

The paper draws every few steps; here it is once a round, so that the update and the optimiser's state are those of few
layers. Embeddings and head, which the paper trains always, are frozen in an emulator; what the layers of an adapter
have in common takes their place. With the method `blocks` the layers train with full rank, as in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from offsite.emulator.parts.base import Drawn, Per, Turn, by_layer, refuse_choice
from offsite.emulator.parts.draws import drawn
from offsite.kernels.schema import Schema


@dataclass(frozen=True)
class Lisa(Drawn):
    """Draw so many of the layers, each as likely as any other."""

    layers: int = 2
    per: Per = "round"

    name: ClassVar[str] = "lisa"

    def __post_init__(self) -> None:
        """Check the range."""
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")

    def fits(self, schema: Schema) -> None:
        """Raise ValueError if the adapter has no more layers than are drawn."""
        if (count := len(by_layer(schema).own)) <= self.layers:
            raise ValueError(
                f"part lisa draws {self.layers} layers in each round, and the adapter has {count}; ask for fewer of "
                "them, have more layers train, or use part all"
            )

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return the groups of the layers drawn, and those that layers have in common; raises ValueError."""
        refuse_choice(self, chosen)
        self.fits(schema)
        own, common = by_layer(schema)
        layers = drawn(own, self.layers, self.name, *turn.draw(self.per))
        return frozenset([*common, *(group for layer in layers for group in own[layer])])
