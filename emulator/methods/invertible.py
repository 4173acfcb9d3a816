"""Invertible adapters (MAD-X, Pfeiffer et al., arXiv 2005.00052): a language's tokens are moved, and moved back.

    (a, b) = x        y_1 = a + F(b)        y_2 = b + G(y_1)        F(b) = U relu(D b + d) + u, and G likewise

This is a coupling as of NICE (arXiv 1410.8516), whose inverse is exact whatever F and G are, and so also of a mean over
sites: b = y_2 - G(y_1), a = y_1 - F(b). It is at the input of the first layer that trains, and its inverse at the
output of the last. Where these are the ends of the stack, as with the placement `ends`, that is the embedding's output,
and what the final norm is given; the paper has the inverse behind that norm.
Beside it each layer that trains has a sequential adapter behind its MLP, a `bottleneck` with biases and ReLU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.roles import roles
from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter, Averaged, Formula, Kind
from offsite.emulator.methods.bottleneck import Bottleneck
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Tier

NAME = "coupling"  # of the module in the first layer, and the second part of a key
NETS = ("F", "G")


class Coupling(nn.Module):
    """A map of R^d onto itself, in fp32, and its inverse: for each of F and G a D (h, d/2), U (d/2, h) and biases."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        """Take what trains by name, "F_down", "F_down_bias", "F_up" and "F_up_bias", and the same of G."""
        super().__init__()
        for name, tensor in parts.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """Return y (..., d) for x (..., d), or what it is made of."""
        first, second = x.to(self.get_parameter("F_up").dtype).chunk(2, dim=-1)
        if inverse:
            second = second - self._net("G", first)
            first = first - self._net("F", second)
        else:
            first = first + self._net("F", second)
            second = second + self._net("G", first)
        return torch.cat([first, second], dim=-1).to(x.dtype)

    def _net(self, net: str, x: Tensor) -> Tensor:
        D, d, U, u = (self.get_parameter(f"{net}_{part}") for part in ("down", "down_bias", "up", "up_bias"))
        return functional.linear(functional.relu(functional.linear(x, D, d)), U, u)

    def before(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Move what a layer is given, as a hook of it."""
        return (self(arguments[0]), *arguments[1:])

    def after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Move back what a layer gives, as a hook of it."""
        if isinstance(output, tuple):
            return (self(output[0], inverse=True), *output[1:])
        return self(output, inverse=True)


@dataclass(frozen=True)
class Invertible(Averaged):
    """Train "0.coupling.F_down" and seven more at the lowest layer, and the tensors of a bottleneck in each layer."""

    bottleneck: int = 48  # the width behind each MLP
    reduction: int = 2  # of the width of F and G: how many times it is in what they are given, d / 2

    name: ClassVar[str] = "invertible"
    needs: ClassVar[frozenset[str]] = frozenset()
    rate: ClassVar[float] = 3e-3
    attaches: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2005.00052"
    kind: ClassVar[Kind] = Kind.ADDITIVE
    formula: ClassVar[Formula] = Formula(
        "layer", "bottleneck * (2 * d + 1) + d", once="2 * (d // 2 + (d + 1) * max(1, d // 2 // reduction))"
    )
    linear: ClassVar[bool] = False
    seeded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.bottleneck < 1 or self.reduction < 1:
            raise ValueError(f"bottleneck and reduction must be at least 1, got {self.bottleneck} and {self.reduction}")

    @property
    def _adapters(self) -> Bottleneck:
        return Bottleneck(width=self.bottleneck, activation="relu", biases=True, modules="mlp-output")

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError where an MLP is not found, or the layers' width has no halves."""
        self._adapters.fits(model, places)
        _width(model, min(places))

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return bottlenecks and a coupling that change nothing: U and all biases are zero, and D is drawn."""
        adapter = self._adapters.start(model, places, seed=seed)
        half = _width(model, min(places)) // 2
        for part, size in _sizes(half, max(1, half // self.reduction)).items():
            key = f"{min(places.values())}.{NAME}.{part}"
            adapter[key] = torch.zeros(size)
            if part.endswith("down"):
                adapter[key].uniform_(-(half**-0.5), half**-0.5, generator=generator(seed, key))
        return adapter

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put bottlenecks behind MLPs, and the coupling around the layers that train; raises ValueError on a misfit."""
        rest, parts = self._apart(adapter, model, places)
        self._adapters.attach(model, places, rest)
        stack = find(model).layers
        first, last = stack[min(places)], stack[max(places)]
        device = next(chain(first.parameters(), first.buffers())).device
        coupling = Coupling({part: t.detach().to(device, torch.float32, copy=True) for part, t in parts.items()})
        first.add_module(NAME, coupling)
        first.register_forward_pre_hook(coupling.before)
        last.register_forward_hook(coupling.after)
        return model

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        live = self.named_parameters(model, places)
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in live.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        coupling = find(model).layers[min(places)].get_submodule(NAME)
        own = {f"{min(places.values())}.{NAME}.{part}": value for part, value in coupling.named_parameters()}
        return self._adapters.named_parameters(model, places) | own

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter: what it is beside has the base's width in every emulator."""
        return adapter

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Raise ValueError: no weight takes in what is not linear."""
        raise ValueError(f"what {self.name} trains is not linear: put it beside the base (offsite.emulator.plug.load)")

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `offsite_adapter.json` and `.safetensors`, for `offsite.emulator.plug.load` on the base."""
        layers = sorted({int(key.partition(".")[0]) for key in adapter})
        rest, _ = self._apart(adapter, base, dict(zip(layers, layers, strict=True)))
        list(self._adapters.fitting(base, self._adapters.placed(rest)))
        own_format.write(directory, self, adapter, base_name=base_name)

    def _apart(self, adapter: Adapter, model: nn.Module, places: Mapping[int, int]) -> tuple[Adapter, Adapter]:
        """Return the bottlenecks by key, and the coupling's tensors by name; raises ValueError if these do not fit."""
        prefix = f"{min(places.values())}.{NAME}."
        parts = {key.removeprefix(prefix): tensor for key, tensor in adapter.items() if key.startswith(prefix)}
        half = _width(model, min(places)) // 2
        inner = len(parts["F_down_bias"]) if "F_down_bias" in parts else 0
        if (sizes := {part: tuple(tensor.shape) for part, tensor in parts.items()}) != _sizes(half, inner):
            raise ValueError(
                f"the lowest layer that trains takes {prefix}F_down (h, {half}), F_down_bias, F_up, F_up_bias and the "
                f"same of G, and the adapter has {sizes or 'none of them'}"
            )
        return {key: tensor for key, tensor in adapter.items() if not key.startswith(prefix)}, parts


def _sizes(half: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a coupling's tensors by name, of halves of so many values and so many inside the nets."""
    sizes = {"down": (inner, half), "down_bias": (inner,), "up": (half, inner), "up_bias": (half,)}
    return {f"{net}_{part}": size for net in NETS for part, size in sizes.items()}


def _width(model: nn.Module, place: int) -> int:
    """Return the width of what layers are given; raises ValueError if it is odd."""
    width, _ = shape(find(model).layers[place].get_submodule(roles(model, place).mlp_out))
    if width % 2:
        raise ValueError(f"the layers have a width of {width}, which has no two halves that a coupling moves in turn")
    return width
