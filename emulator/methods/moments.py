"""Moments of the sites' data: sums that a start is made of, in a round of their own in which nothing trains.

    inputs      sum x x^T over positions     CorDA (arXiv 2406.05223), EVA (arXiv 2410.07170)
    gradients   sum dL/dW over targets       LoRA-GA (arXiv 2407.05000)
    squares     sum (dL/dW)^2 over batches   SPT (arXiv 2303.08566), where L is a batch's mean loss

Each adds exactly over sites, so that a start is that of the pooled data. A run of such a method begins from the run
that measured: `start`. What is measured is the emulator as it was handed out.

Second moments of inputs are those of private activations: who has them knows in which directions a site's texts lie,
and of few positions the texts themselves; gradients are what attacks on gradients begin with. Neither sites nor owners
allow this method unless they say so, many rows a site hide more than few, and sites may ask for noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.methods import own_format, peft_format
from offsite.emulator.methods.base import Adapter, Averaged, Formula, Kind, Place
from offsite.emulator.methods.maps import linear_at, moved, wrapped
from offsite.emulator.methods.sums import grouped, packed, side, sources, unpacked
from offsite.emulator.methods.targets import Modules
from offsite.emulator.modality import Batch
from offsite.kernels.schema import Field, Rule, Schema, Tier
from offsite.kernels.sparse import gradient


class Measured(nn.Module):
    """A linear map that stays what it is, and sums of what went through it, in fp64."""

    def __init__(self, linear: nn.Module, sums: Mapping[str, Tensor]) -> None:
        """Take the map, and its sums by part."""
        super().__init__()
        self.linear = linear
        device = next(chain(linear.parameters(), linear.buffers())).device
        for part, tensor in sums.items():
            self.register_buffer(part, tensor.detach().to(device, torch.float64, copy=True))
        self.parts = tuple(sums)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        return y

    @property
    def sums(self) -> dict[str, Tensor]:
        """The live sums by part."""
        return {part: self.get_buffer(part) for part in self.parts}


@dataclass(frozen=True)
class Moments(Averaged):
    """Measure moments of the maps that train: "28.mlp.down_proj.inputs" and ".count", ".gradients" or ".squares"."""

    of: Literal["inputs", "gradients", "squares"] = "inputs"
    modules: Modules = "all-linear"

    name: ClassVar[str] = "moments"
    needs: ClassVar[frozenset[str]] = frozenset()
    rate: ClassVar[float] = 1e-3  # of no bearing: nothing trains
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.SUM})
    attaches: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2406.05223"
    kind: ClassVar[Kind] = Kind.MEASURED
    formula: ClassVar[Formula] = Formula("map", "d_in * (d_in + 1) // 2 + 1 if of == 'inputs' else d_out * d_in")
    linear: ClassVar[bool] = True  # W stays as it is
    seeded: ClassVar[bool] = False

    @property
    def gives(self) -> str:
        """See `methods.base.Measuring`."""
        return self.of

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has none of the maps."""
        list(self._maps(model, places))

    def schema(self, start: Adapter) -> Schema:
        """Return sums."""
        fields: Schema = {}
        for place, parts in grouped(start).items():
            for part, tensor in parts.items():
                dtype = "F64" if part == "count" else "F32"
                fields[place.key(part)] = Field(dtype, tuple(tensor.shape), Rule.SUM, f"{place.layer}.{place.path}")
        return fields

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return sums of nothing."""
        adapter: Adapter = {}
        for place, linear in self._maps(model, places):
            d_out, d_in = shape(linear)
            if self.of == "inputs":
                adapter[place.key("inputs")] = torch.zeros(d_in * (d_in + 1) // 2)
                adapter[place.key("count")] = torch.zeros(1, dtype=torch.float64)
            else:
                adapter[place.key(self.of)] = torch.zeros(d_out, d_in)
        return adapter

    def _maps(self, model: nn.Module, places: Mapping[int, int]) -> Iterator[tuple[Place, nn.Module]]:
        """Yield the maps that have sums; raises ValueError if a layer has none."""
        stack = find(model).layers
        for at, paths in peft_format.maps(model, places, self.modules, method=self.name).items():
            first = sources(model, at, paths)
            for path in paths:
                if self.of != "inputs" or first[path] == path:
                    yield Place(places[at], path), stack[at].get_submodule(path)

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put the sums beside the maps, in place, which changes nothing; raises ValueError if they do not fit."""
        parts = grouped(adapter)
        there = {at: parts[place] for place, at in moved(parts, places).items()}
        for place, sums in there.items():
            _check(place, shape(linear_at(model, place)), sums)
        model.requires_grad_(False)
        stack = find(model).layers
        for place, sums in there.items():
            stack[place.layer].set_submodule(place.path, Measured(linear_at(model, place), sums))
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the sums off an attached model as CPU copies, fp32 but for counts."""
        return {
            place.key(part): tensor.to("cpu", torch.float64 if part == "count" else torch.float32, copy=True)
            for place, measured in wrapped(model, places, Measured).items()
            for part, tensor in measured.sums.items()
        }

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return nothing: nothing trains."""
        return {}

    def sums(self, model: nn.Module, places: Mapping[int, int]) -> list[Tensor]:
        """See `methods.base.Measuring`."""
        return [total for one in wrapped(model, places, Measured).values() for total in one.sums.values()]

    def measure(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> float:
        """See `methods.base.Measuring`: one pass, and for gradients the way back; what is multiplied is fp32."""
        listen = partial(_inputs, batch.mask.flatten().bool()) if self.of == "inputs" else partial(_gradients, self.of)
        handles = [
            one.register_forward_hook(listen(f"{place.layer}.{place.path}", one))
            for place, one in wrapped(model, places, Measured).items()
        ]
        training = model.training
        model.eval()  # without dropout
        try:
            with torch.set_grad_enabled(self.of != "inputs"):
                loss = modality.loss(model, batch)
                if self.of == "gradients":  # of the sum over all targets, so that it matters not how rows are batched
                    (loss * batch.targets).backward()  # type: ignore[no-untyped-call]
                elif self.of == "squares":
                    loss.backward()  # type: ignore[no-untyped-call]
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        return float(loss.detach())

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the sums as large as the base's maps where the emulator's were narrowed; the rest is zero.

        `recovery` is as `methods.recovery.widen` has it. Raises ValueError if it does not fit.
        """
        wide: Adapter = {}
        for place, sums in grouped(adapter).items():
            name = f"{place.layer}.{place.path}"
            if f"{name}.shape" not in recovery:
                wide |= {place.key(part): tensor for part, tensor in sums.items()}
                continue
            d_out, d_in = recovery[f"{name}.shape"].tolist()
            rows, columns = recovery.get(f"{name}.rows", torch.arange(d_out)), recovery.get(f"{name}.columns")
            columns = torch.arange(d_in) if columns is None else columns
            _check(place, (len(rows), len(columns)), sums)
            for part, tensor in sums.items():
                if part == "inputs":
                    full = tensor.new_zeros(d_in, d_in)
                    full[columns[:, None], columns] = unpacked(tensor)
                    tensor = packed(full)
                elif part != "count":
                    full = tensor.new_zeros(d_out, d_in)
                    full[rows[:, None], columns] = tensor
                    tensor = full
                wide[place.key(part)] = tensor
        return wide

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Raise ValueError: no weight changes."""
        raise ValueError(f"{self.name} measures and changes no weight; its sums stay beside the base")

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write the sums in the format of this project."""
        own_format.write(directory, self, adapter, base_name=base_name)


def _check(place: Place, size: tuple[int, int], sums: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless sums are those of a map (d_out, d_in)."""
    for part, tensor in sums.items():
        own = (side(len(tensor)),) if part == "inputs" else tuple(tensor.shape)
        if own != {"inputs": size[1:], "count": (1,)}.get(part, size):
            raise ValueError(f"{place.key(part)!r}: {own} does not fit a linear map of (d_out, d_in) = {size}")


def _inputs(real: Tensor, name: str, measured: Measured) -> Any:
    """Return a hook that adds x x^T of the positions that are real."""

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], __: Tensor) -> None:
        rows = arguments[0].detach().flatten(0, -2)
        if len(rows) != len(real):
            raise ValueError(
                f"{name} is given {len(rows)} of a batch's {len(real)} positions, so that it cannot be told which are "
                "padding; leave it out of modules"
            )
        rows = rows[real].float()
        measured.sums["inputs"].add_(packed(rows.T @ rows))
        measured.sums["count"].add_(len(rows))

    return hook


def _gradients(of: str, _: str, measured: Measured) -> Any:
    """Return a hook that adds the gradient of a map's matrix, or its squares, on the way back."""

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        x = arguments[0].detach()
        if not y.requires_grad:
            y.requires_grad_()  # nothing that trains comes before the first maps

        def see(of_output: Tensor) -> None:
            of_matrix = gradient(x, of_output.float())
            measured.sums[of].add_(of_matrix.square() if of == "squares" else of_matrix)

        y.register_hook(see)  # type: ignore[no-untyped-call]

    return hook
