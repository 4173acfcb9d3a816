"""The outline of an emulator, and an emulator in the making."""

from dataclasses import dataclass, field

from torch import Tensor, nn

# What an emulator may have that a later builder, or a method, needs. Another package may add to these.
REDUCTION = "reduction"  # layers or parts of layers are gone
CENTROIDS = "centroids"  # maps whose entries are one of a few values that can train
# What layers may be that are no longer the base's, and not all methods can train so. It may add to these, too.
NARROWED = "narrowed"  # rows or columns of maps are gone
PACKED = "stored in few bits"


@dataclass(frozen=True)
class Grounds:
    """On what layers were chosen: how alike they are, and how near another choice was."""

    links: dict[int, float]  # CKA of each layer that may go with the next of them
    gap: float  # log of the ratio of 1 - CKA, between what was told apart at the border
    margin: float  # below which other ways were looked at too
    ways: int  # how many there were; of more than one the calibration text decided
    lead: float | None  # nats a token by which the best was better than the next


@dataclass(frozen=True)
class Outline:
    """The layers of an emulator. `layers[p]` is the base's layer that place p stands for, by absolute id.

    A place in `shared` has the parameters of the place it maps to, which itself is not in `shared`.
    """

    layers: tuple[int, ...]
    trainable: tuple[int, ...]
    shared: dict[int, int] = field(default_factory=dict)
    grounds: Grounds | None = field(default=None, compare=False, repr=False)

    @property
    def places(self) -> dict[int, int]:
        """Place in the emulator -> absolute id, of the layers that train."""
        return {p: layer for p, layer in enumerate(self.layers) if layer in self.trainable and p not in self.shared}

    @property
    def own(self) -> list[int]:
        """The places that have parameters of their own."""
        return [place for place in range(len(self.layers)) if place not in self.shared]

    @property
    def frozen(self) -> list[int]:
        """The places that have parameters of their own and do not train."""
        return [place for place in self.own if place not in self.places]


@dataclass(frozen=True)
class Draft:
    """An emulator in the making.

    `model` has the outline's layers and shares with `base` every tensor that no builder changed; `base` is never
    changed. `tuned` are the places whose parameters were trained, so that they are no longer the base's. `recovery` is
    what the owner keeps to bring an adapter back to the base: "<layer>.<path inside the layer>.<part>" -> tensor.
    """

    base: nn.Module
    model: nn.Module
    outline: Outline
    tuned: tuple[int, ...] = ()
    recovery: dict[str, Tensor] = field(default_factory=dict)
