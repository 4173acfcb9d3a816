"""What methods have in common that measure what their rows are like, to tell the data of one task from another's.

Each row gives some whole numbers, and their sums over rows are the adapter: "0.signature.terms", at the lowest layer
that trains, as they are of no layer alone. Sums of several sites add up to those of all rows, bit by bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import find
from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter, Averaged, Formula, Kind
from offsite.emulator.modality import Batch
from offsite.kernels.schema import Field, Rule, Schema, Tier

Parts: TypeAlias = dict[str, Tensor]  # by name, without the layer
Forward: TypeAlias = Callable[[nn.Module, Batch], Tensor]


class Tally(nn.Module):
    """The sums so far, in fp64; it is called by nobody."""

    def __init__(self, parts: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the sums by part."""
        super().__init__()
        for part, tensor in parts.items():
            self.register_buffer(part, tensor.detach().to(device, torch.float64, copy=True))


class Tallied(Averaged, ABC):
    """A method of this kind; nothing trains, and no weight changes."""

    name: ClassVar[str]
    asks_model: ClassVar[bool]  # see `routing.Telling`
    needs: ClassVar[frozenset[str]] = frozenset()
    rate: ClassVar[float] = 1e-3  # of no bearing: nothing trains
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.SUM})
    attaches: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.MEASURED
    paper: ClassVar[str]
    formula: ClassVar[Formula]
    linear: ClassVar[bool] = True  # W stays as it is
    seeded: ClassVar[bool] = False

    @property
    @abstractmethod
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each part; "count" (1,), that of rows, is among them."""

    @property
    @abstractmethod
    def gives(self) -> str:
        """See `methods.base.Measuring`."""

    @abstractmethod
    def tally(
        self, model: nn.Module, places: Mapping[int, int], batch: Batch, forward: Forward
    ) -> tuple[Parts, Tensor]:
        """Return what each row of a batch on the model's device gives, (b, ...) by part, and what `forward` returns."""

    @abstractmethod
    def likeness(self, rows: Mapping[str, Tensor], known: Mapping[str, Adapter]) -> Tensor:
        """Return (b, tasks) fp64 in -1 .. 1, how like rows are to the sums of each known task, in their order."""

    def rows(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> Parts:
        """Return what each row of a batch gives, (b, ...) by part; rows need no target, and nothing is added."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self.tally(model, places, batch, _last)[0]
        finally:
            model.train(training)

    def parts(self, adapter: Mapping[str, Tensor]) -> Parts:
        """Return an adapter's sums by part; raises ValueError unless they are this method's, of one layer."""
        _, parts = self._read(adapter)
        return parts

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Accept all models: nothing of their layers is asked for."""

    def schema(self, start: Adapter) -> Schema:
        """Return sums."""
        layer, _ = self._read(start)
        return {
            f"{layer}.{self.name}.{part}": Field("F64", size, Rule.SUM, f"{layer}.{self.name}")
            for part, size in self.sizes.items()
        }

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return sums of nothing."""
        layer = min(places.values())
        return {
            f"{layer}.{self.name}.{part}": torch.zeros(size, dtype=torch.float64) for part, size in self.sizes.items()
        }

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put the sums into the lowest layer that trains, in place, which changes nothing; raises ValueError."""
        layer, parts = self._read(adapter)
        if layer != min(places.values()):
            raise ValueError(f"the sums are at layer {layer}, but the lowest that trains is {min(places.values())}")
        model.requires_grad_(False)
        lowest = find(model).layers[min(places)]
        device = next(chain(lowest.parameters(), lowest.buffers())).device
        lowest.add_module(self.name, Tally(parts, device))
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the sums off an attached model as CPU copies."""
        layer = min(places.values())
        live = self._live(model, places)
        return {f"{layer}.{self.name}.{part}": tensor.to("cpu", copy=True) for part, tensor in live.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return nothing: nothing trains."""
        return {}

    def sums(self, model: nn.Module, places: Mapping[int, int]) -> list[Tensor]:
        """See `methods.base.Measuring`."""
        return list(self._live(model, places).values())

    def measure(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> float:
        """See `methods.base.Measuring`: one forward pass."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                rows, loss = self.tally(model, places, batch, modality.loss)
        finally:
            model.train(training)
        for part, total in self._live(model, places).items():
            total.add_(rows[part].sum(dim=0).to(total))
        return float(loss)

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the sums: they are of rows, and of no map."""
        return adapter

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Raise ValueError: no weight changes."""
        raise ValueError(f"{self.name} measures and changes no weight; its sums stay beside the base")

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write the sums in the format of this project."""
        own_format.write(directory, self, adapter, base_name=base_name)

    def _live(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, Tensor]:
        return dict(find(model).layers[min(places)].get_submodule(self.name).named_buffers())

    def _read(self, adapter: Mapping[str, Tensor]) -> tuple[int, Parts]:
        """Return the layer, and the sums by part; raises ValueError unless they are this method's."""
        layer = next(iter(adapter), "").partition(".")[0]
        shapes = {key: tuple(tensor.shape) for key, tensor in adapter.items()}
        if not layer.isdecimal() or shapes != {
            f"{layer}.{self.name}.{part}": size for part, size in self.sizes.items()
        }:
            ways = ", ".join(f"{part} {size}" for part, size in self.sizes.items())
            raise ValueError(f"sums of {self.name} are '<layer>.{self.name}.<part>', of {ways}; got {shapes}")
        return int(layer), {part: adapter[f"{layer}.{self.name}.{part}"] for part in self.sizes}


def _last(model: nn.Module, batch: Batch) -> Tensor:
    return modality.run(model, batch, keep=batch.last)
