"""Prototypes of tasks: what the hidden states of layers are like, as hyperdimensional codes that add over sites.

Of each row the mean hidden state after every layer that trains is projected at random, and the signs are bound to a key
of the layer and bundled over layers and rows (EAR, Daniels et al., arXiv 2308.02084).
Sums of whole numbers go out, not signs, so that those of two sites are that of the pooled rows, bit by bit.

Such a sum is of private activations. Of one row its signs say at which angles the hidden states lie to all directions
of the projection, which is drawn from `salt` and known to all of a run, so the hidden states themselves, but for their
length; of many rows it says what they have in common. Neither sites nor owners allow this method unless they say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find
from offsite.emulator.methods.base import Adapter, Formula
from offsite.emulator.methods.tallied import Forward, Parts, Tallied
from offsite.emulator.modality import Batch
from offsite.emulator.seeds import generator
from offsite.kernels import hyperdimensional
from offsite.kernels.cosines import cosines


@dataclass(frozen=True)
class Prototype(Tallied):
    """Measure "0.prototype.bundle" (size,) and ".count" (1,), that of rows; compared is what has one salt and model."""

    size: int = 4096  # of a code
    salt: int = 0  # of the projection and the keys

    name: ClassVar[str] = "prototype"
    asks_model: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2308.02084"
    formula: ClassVar[Formula] = Formula("layer", "0", once="size + 1")

    def __post_init__(self) -> None:
        """Check the range."""
        if not 64 <= self.size <= 2**16:
            raise ValueError(f"size must be from 64 to {2**16:,}, got {self.size}")

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """See `Tallied.sizes`."""
        return {"bundle": (self.size,), "count": (1,)}

    @property
    def gives(self) -> str:
        """See `methods.base.Measuring`."""
        return "features"

    def tally(
        self, model: nn.Module, places: Mapping[int, int], batch: Batch, forward: Forward
    ) -> tuple[Parts, Tensor]:
        """Bundle the codes of each row's layers."""
        real = batch.mask[..., None].float()
        features: dict[int, Tensor] = {}

        def listen(layer: int) -> Any:
            def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                hidden = (output[0] if isinstance(output, tuple) else output).detach().float()
                features[layer] = (hidden * real).sum(dim=1) / real.sum(dim=1)

            return hook

        stack = find(model).layers
        handles = [stack[at].register_forward_hook(listen(layer)) for at, layer in places.items()]
        try:
            result = forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return self.codes(features), result

    def codes(self, features: Mapping[int, Tensor]) -> Parts:
        """Return what features (n, d) of each layer give, by the layer's number in the base."""
        width = next(iter(features.values())).shape[1]
        projection, keys = (
            _projection(self.salt, self.size, width),
            [_key(self.salt, self.size, one) for one in features],
        )
        device = next(iter(features.values())).device
        bundle = hyperdimensional.bundle(
            list(features.values()), projection.to(device), [key.to(device) for key in keys]
        )
        return {"bundle": bundle, "count": torch.ones(len(bundle), 1, device=device)}

    def likeness(self, rows: Mapping[str, Tensor], known: Mapping[str, Adapter]) -> Tensor:
        """Return cosines of bundles."""
        others = torch.stack([self.parts(adapter)["bundle"] for adapter in known.values()])
        return cosines(rows["bundle"].cpu(), others)


@cache
def _projection(salt: int, size: int, width: int) -> Tensor:
    return hyperdimensional.bipolar(size, width, generator=generator(salt, f"projection {size} {width}"))


@cache
def _key(salt: int, size: int, layer: int) -> Tensor:
    return hyperdimensional.bipolar(size, generator=generator(salt, f"key {size} {layer}"))
