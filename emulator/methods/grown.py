"""What methods have in common whose entries each site chooses: it drops some and grows others by its own text.

Once a round, before the first step, a site keeps the entries that have changed most and grows as many others as a map
is short of, where the gradient of its first batch is largest. That is the only moment at which it holds the gradient
of a map's whole matrix, of one map at a time; an optimiser that begins afterwards has no moments to forget. Entries
that grow start at zero; one that is dropped and grown at once stays as it is.

Sites differ in their indices then, and a strategy averages the sparse matrices over the union of these. Which entries a
site has grown says where its text's gradient is largest, and no noise on the values hides that.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import shape
from offsite.emulator.methods.base import Adapter, Place
from offsite.emulator.methods.entries import Entries, SparseEntries
from offsite.emulator.methods.maps import wrapped
from offsite.emulator.modality import Batch
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Rule, Schema
from offsite.kernels.sparse import Vector, dense, gradient, largest


class GrownEntries(SparseEntries):
    """A method of this kind; it says how many entries of a map stay."""

    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.UNION, Rule.FIXED})
    spares: ClassVar[frozenset[str]] = frozenset()
    seeded: ClassVar[bool] = True

    @abstractmethod
    def kept(self, change: Tensor) -> int:
        """Return how many entries of a map stay, given how far (k,) each has changed since the run's start."""

    def select(self, place: Place, linear: nn.Module, count: int, *, seed: int) -> Tensor:
        """Return entries drawn for each map alone, one of each of `count` equal stretches of the matrix."""
        d_out, d_in = shape(linear)
        bounds = torch.arange(count + 1) * (d_out * d_in) // count
        drawn = torch.rand(count, dtype=torch.float64, generator=generator(seed, place.key("index")))
        return bounds[:-1] + (drawn * bounds.diff()).long()

    def schema(self, start: Adapter) -> Schema:
        """Return indices and changes that are averaged as the matrices they are of."""
        return {
            key: replace(field, rule=Rule.UNION, shape=(None,)) if key.rpartition(".")[2] != "size" else field
            for key, field in super().schema(start).items()
        }

    def choose(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> list[Tensor]:
        """See `methods.base.Choosing`."""
        short = [one for one in wrapped(model, places, Entries).values() if self.kept(one.change) < len(one.change)]
        if not short:
            return []
        grown: dict[Entries, Vector] = {}
        handles = [one.register_forward_hook(self._watch(grown)) for one in short]
        training, device = model.training, next(model.parameters()).device
        model.eval()
        try:
            modality.loss(model, batch.to(device)).backward()  # type: ignore[no-untyped-call]
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        for one in wrapped(model, places, Entries).values():
            one.change.grad = None
        with torch.no_grad():
            for one, (at, change) in grown.items():  # not before: the backward pass goes by the old ones
                one.get_buffer("index").copy_(at)
                one.change.copy_(change)
        return [tensor for one in short for tensor in (one.get_buffer("index"), one.change.data)]

    def _watch(self, grown: dict[Entries, Vector]) -> Any:
        """Return a hook of a forward pass that notes on the way back what a map's entries are to be."""

        def hook(entries: Entries, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = arguments[0].detach()

            def see(of_output: Tensor) -> None:
                grown[entries] = self._grow(entries, gradient(x, of_output.float()))

            output.register_hook(see)  # type: ignore[no-untyped-call]

        return hook

    @torch.no_grad()
    def _grow(self, entries: Entries, of_matrix: Tensor) -> Vector:
        """Return a map's entries after the choice, given the gradient (d_out, d_in) of its matrix."""
        at, change = entries.get_buffer("index").long(), entries.change
        stay = at[largest(change, self.kept(change))]
        height = of_matrix.abs().flatten().nan_to_num_(nan=0.0)
        height[stay] = torch.inf
        union = largest(height, len(at))
        return Vector(union, dense(at, change, entries.size).flatten()[union])
