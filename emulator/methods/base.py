"""What a method offers: how an adapter starts, how it is attached to a model, and how it is read back.

An adapter is a dict of fp32 tensors keyed by the base's absolute layer ids. Of the kind "low-rank" it has two factors
for a map y = W x, "28.self_attn.q_proj.A" (r, d_in) and ".B" (d_out, r), which stand for the change scale * B @ A. Of
the kind "linear" its tensors are such that their mean is the mean of what they do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from offsite.kernels.schema import Schema, Tensors

Adapter = Tensors


class Place(NamedTuple):
    """A linear map of the base: the absolute id of its layer, and its path inside the layer."""

    layer: int
    path: str

    def key(self, factor: str) -> str:
        """Return the adapter's key of a factor, "A" or "B"."""
        return f"{self.layer}.{self.path}.{factor}"


class Factors(NamedTuple):
    """The two factors of one map: A (r, d_in) and B (d_out, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """The inner dimension of B @ A."""
        return self.A.shape[0]


def factors(adapter: Mapping[str, Tensor]) -> dict[Place, Factors]:
    """Group an adapter by map; raises ValueError on a key or a pair of shapes that is none of an adapter's."""
    found: dict[Place, Factors] = {}
    for key in adapter:
        layer, _, rest = key.partition(".")
        path, _, factor = rest.rpartition(".")
        if not (layer.isdecimal() and path and factor in ("A", "B")):
            raise ValueError(f"adapter key {key!r}: expected '<layer>.<path inside the layer>.A' or '.B'")
        place = Place(int(layer), path)
        if factor == "A":
            if place.key("B") not in adapter:
                raise ValueError(f"the adapter has {key!r} but not {place.key('B')!r}")
            pair = Factors(adapter[key], adapter[place.key("B")])
            if pair.A.ndim != 2 or pair.B.ndim != 2 or pair.A.shape[0] != pair.B.shape[1]:
                raise ValueError(f"{key!r}: A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)} do not multiply")
            found[place] = pair
        elif place.key("A") not in adapter:
            raise ValueError(f"the adapter has {key!r} but not {place.key('A')!r}")
    if not found:
        raise ValueError("the adapter is empty")
    return found


class Method(Protocol):
    """A way to train a model; its fields are its settings. `places` maps a place in `model` to an absolute layer id.

    `recovery` is what the builders kept to bring an adapter back to the base (see `builders.base.Draft`); an adapter
    that was recovered is the base's and no longer the emulator's.
    """

    name: ClassVar[str]
    kind: ClassVar[str]  # how its adapters may be aggregated: "low-rank" or "linear"
    needs: ClassVar[frozenset[str]]  # what of an emulator it trains, such as `outline.CENTROIDS`; mostly nothing
    rate: ClassVar[float]  # the learning rate that `tuning.rates` begins with

    def rank_at(self, site: str) -> int:
        """The rank a site trains at; 0 for methods without one."""
        ...

    def schema(self, start: Adapter) -> Schema:
        """Return what its adapters are made of, from one of them, of which only names and shapes are looked at."""
        ...

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, rank: int | None = None) -> Adapter:
        """Return the adapter that changes nothing; the same for base and emulator, whichever layers train."""
        ...

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put an adapter into a model, in place, so that it trains in fp32 and the rest is frozen."""
        ...

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        ...

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        ...

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Bring an adapter of an emulator back to the base; raises ValueError if it does not fit."""
        ...

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add a recovered adapter to the base's weights, in place; raises ValueError if it does not fit."""
        ...

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write a recovered adapter as files that others can load."""
        ...
