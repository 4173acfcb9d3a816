"""The centroids of sketched maps (SketchTune, arXiv 2410.06364): no second path, and no bound on the rank of a change.

Where sites share the codes, W is linear in the grid: the mean of grids is exactly the grid of the mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find, is_transposed, linears, shape
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.formats.sketch import Sketch
from offsite.emulator.methods.base import Adapter, Averaged, Formula, Kind
from offsite.emulator.outline import CENTROIDS
from offsite.kernels.schema import Tier
from offsite.kernels.sketch import decode


@dataclass(frozen=True)
class Grids(Averaged):
    """The grids of the layers that train; an adapter holds their values: "28.self_attn.q_proj.grid".

    The codes stay with the emulator's owner, and a recovered adapter is the change of each W: "28.mlp.up_proj.change".
    """

    name: ClassVar[str] = "grids"
    needs: ClassVar[frozenset[str]] = frozenset({CENTROIDS})
    rate: ClassVar[float] = 3e-4
    paper: ClassVar[str] = "arXiv 2410.06364"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "16 * d_out * grids")
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = False

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Any layer whose maps are sketched can train, and shapes do not tell which are."""

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return the grids as they are; raises ValueError if there are none."""
        return self.state(model, places)

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Give the layers grids of their own; raises ValueError if the adapter does not fit them."""
        live = _sketched(model, places)
        if live.keys() != adapter.keys():
            raise ValueError(f"the model does not take the adapter's keys {sorted(live.keys() ^ adapter.keys())[:3]}")
        grids = {key: linear.get_parameter("grid") for key, linear in live.items()}
        for key, grid in grids.items():
            _check(key, adapter[key], grid.shape)
        model.requires_grad_(False)
        for key, linear in live.items():
            linear.grid = nn.Parameter(adapter[key].detach().to(grids[key].device, torch.float32, copy=True))
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the grids off a model as CPU fp32 copies."""
        live = self.named_parameters(model, places)
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in live.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live grids by adapter key; raises ValueError if there are none."""
        return {key: linear.get_parameter("grid") for key, linear in _sketched(model, places).items()}

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return how far each W has moved from its sketch, (d_out, d_in); zeros where a map was narrowed before.

        `recovery` has the codes and the grid that the builder sketch made, and for a narrowed map what
        `methods.recovery.widen` says. Raises ValueError if the adapter does not fit.
        """
        changes: Adapter = {}
        for key, grid in adapter.items():
            name = key.removesuffix(".grid")
            if key not in recovery or f"{name}.codes" not in recovery:
                raise ValueError(f"{key!r}: the emulator has no such grid that trains, so it cannot go to the base")
            _check(key, grid, recovery[key].shape)
            change = decode(grid, recovery[f"{name}.codes"]) - decode(recovery[key], recovery[f"{name}.codes"])
            if f"{name}.shape" in recovery:
                d_out, d_in = recovery[f"{name}.shape"].tolist()
                rows = recovery.get(f"{name}.rows", torch.arange(d_out))
                columns = recovery.get(f"{name}.columns", torch.arange(d_in))
                change = change.new_zeros(d_out, d_in).index_put((rows[:, None], columns), change)
            changes[f"{name}.change"] = change
        return changes

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add the changes to the base's weights, in place and in fp32; raises ValueError if they do not fit."""
        maps = _linears(base, adapter)
        with torch.no_grad():
            for key, linear in maps.items():
                weight = linear.get_parameter("weight")
                change = adapter[key].to(weight.device, torch.float32)
                weight.copy_(weight.float() + (change.T if is_transposed(linear) else change))

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `changes.safetensors`: what to add to the base's tensors, by their names and in their orientation."""
        path = find(base).path
        tensors: Adapter = {}
        for key, linear in sorted(_linears(base, adapter).items()):
            change = adapter[key].T if is_transposed(linear) else adapter[key]
            tensors[f"{path}.{key.removesuffix('.change')}.weight"] = change.contiguous()
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "changes.safetensors", metadata={"format": "pt"})


def _sketched(model: nn.Module, places: Mapping[int, int]) -> dict[str, PackedLinear]:
    """Return the sketched maps of the layers by adapter key."""
    stack = find(model).layers
    maps: dict[str, PackedLinear] = {}
    for place, layer in places.items():
        for path, module in stack[place].named_modules():
            if isinstance(module, PackedLinear) and isinstance(module.format, Sketch):
                maps[f"{layer}.{path}.grid"] = module
        if not any(key.startswith(f"{layer}.") for key in maps):
            raise ValueError(
                f"layer {layer} has no sketched map, and grids trains nothing else: build the emulator with the "
                "builder sketch and its layers set to 'all', or choose another method"
            )
    return maps


def _linears(base: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """Return the map that each change belongs to; raises ValueError if one does not fit."""
    stack = find(base).layers
    maps: dict[str, nn.Module] = {}
    for key, change in adapter.items():
        layer, _, path = key.removesuffix(".change").partition(".")
        if not (key.endswith(".change") and layer.isdecimal() and int(layer) < len(stack)):
            raise ValueError(f"{key!r}: expected '<layer>.<path>.change' of a base with {len(stack)} layers")
        if path not in linears(stack[int(layer)]):
            raise ValueError(f"{key!r}: the layers of the base have no linear map {path!r}")
        maps[key] = stack[int(layer)].get_submodule(path)
        _check(key, change, shape(maps[key]))
    return maps


def _check(key: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(f"{key!r} {tuple(value.shape)} does not fit the model, which has it as {tuple(expected)}")
