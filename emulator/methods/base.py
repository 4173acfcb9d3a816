"""What a method offers: how an adapter starts, how it is attached to a model, and how it is read back.

An adapter is a dict of tensors keyed by the base's absolute layer ids, and its method's schema says what they are. What
trains is fp32. A low-rank adapter has two factors for a map y = W x, "28.self_attn.q_proj.A" (r, d_in) and ".B"
(d_out, r), which stand for the change scale * B @ A.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from offsite.emulator.modality import Batch
from offsite.kernels.schema import Field, Rule, Schema, Tensors, Tier

Adapter = Tensors


class Kind(StrEnum):
    """What of a model trains, as surveys have it (Han et al., arXiv 2403.14608)."""

    ADDITIVE = "additive"  # modules or values beside the weights
    SELECTIVE = "selective"  # some of the weights
    REPARAMETERISED = "reparameterised"  # fewer values, of which a change of the weights is made
    HYBRID = "hybrid"  # several of these
    MEASURED = "measured"  # nothing: sites measure what their data are like


class Disclosure(StrEnum):
    """What of the base's weights whoever has an adapter has with it, beside the values that train."""

    NOTHING = ""
    PARTS = "parts"  # of which its start is computed, so that two machines may differ in the last digits of it
    FIGURES = "figures"  # which what is exported needs, and no start


class Formula(NamedTuple):
    """How many values train, as Python expressions of the method's settings and the sizes of each thing that trains.

    A "map" has `d_out`, `d_in`, `bias` (whether it has one), `cells`, the blocks that SoKA cuts it into, `pair`, the
    rank of a pair of factors beside it or 0, and, if it is sketched, `grids` of a row. A "layer" has `parameters`, the
    hidden width `d`, the MLP's `d_ff` channels and `inward` maps before them, `heads` of queries and `kv` of keys and
    values, and `width`, that of a head. `once` is of settings, and of sizes that all have in common.
    """

    each: Literal["map", "layer"]
    values: str
    once: str = ""  # of what all of them have in common


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
    pairs: dict[Place, Factors] = {}
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
            pairs[place] = pair
        elif place.key("A") not in adapter:
            raise ValueError(f"the adapter has {key!r} but not {place.key('A')!r}")
    if not pairs:
        raise ValueError("the adapter is empty")
    return pairs


class Method(Protocol):
    """A way to train a model; its fields are its settings. `places` maps a place in `model` to an absolute layer id.

    `recovery` is what the builders kept to bring an adapter back to the base (see `builders.base.Draft`); an adapter
    that was recovered is the base's and no longer the emulator's.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]  # what of an emulator it trains, such as `outline.CENTROIDS`; mostly nothing
    spares: ClassVar[frozenset[str]]  # what layers that it trains must not be, such as `outline.NARROWED`
    rate: ClassVar[float]  # the learning rate that `tuning.rates` begins with
    rules: ClassVar[frozenset[Rule]]  # those of its schema
    attaches: ClassVar[bool]  # whether a plug-in is measured beside the base's weights, which rounding would change
    mergeable: ClassVar[bool]  # whether weights can take it in; what they cannot attaches, and nobody merges it
    withheld: ClassVar[frozenset[str]]  # settings that sites are not told, for they say who else takes part
    paper: ClassVar[str]  # where it is from, such as "arXiv 2106.09685"
    kind: ClassVar[Kind]
    formula: ClassVar[Formula]
    linear: ClassVar[bool]  # whether W is linear in its products and other values together: their means give W's mean
    seeded: ClassVar[bool]  # whether its start is drawn from the run's seed, which all sites must have in common
    disclosure: ClassVar[Disclosure]

    def tier_at(self, site: str) -> Tier:
        """The tier of a site: what it trains of the adapter, or at which size; "" for methods with only one."""
        ...

    def tiers(self) -> frozenset[Tier]:
        """Return every tier that some site may have."""
        ...

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if the places of a model cannot train; nothing but shapes is looked at."""
        ...

    def schema(self, start: Adapter) -> Schema:
        """Return what its adapters are made of, from one that changes nothing."""
        ...

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return a tier's adapter that changes nothing; the same for base and emulator where the same layers train.

        Of the tier "" it is what sites have that no setting names. Raises ValueError for a tier that is none.
        """
        ...

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put an adapter into a model, in place, so that it trains in fp32 and the rest is frozen."""
        ...

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        ...

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model, each by the adapter's key of what becomes of it."""
        ...

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Bring an adapter of an emulator back to the base; raises ValueError if it does not fit."""
        ...

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Add a recovered adapter to the base's weights, in place; raises ValueError if it does not fit or cannot."""
        ...

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write a recovered adapter as files that others can load."""
        ...


@runtime_checkable
class Choosing(Protocol):
    """A method of which each site chooses by its own data what trains, once a round, before the first step."""

    def choose(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> list[Tensor]:
        """Choose by the gradient of one batch, in place, in an attached model; nothing that is drawn decides.

        Return the live tensors that say what trains, and the parameters: processes that train together have to have
        the same ones.
        """
        ...


@runtime_checkable
class Sharing(Protocol):
    """A method of which layers or tasks share what trains; its schema says what is each one's own (`Field.private`)."""

    private: int  # how much of it; 0: nothing


@runtime_checkable
class Measuring(Protocol):
    """A method of which nothing trains: a site measures a round's batches once, and sends the sums.

    Its start is zeros, from which sites begin every round, and an attached adapter changes nothing.
    """

    @property
    def gives(self) -> str:
        """Say what its sums are of, by which others begin from them (`Beginning`)."""
        ...

    def measure(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> float:
        """Add to the sums of an attached model what a batch on its device gives; return the batch's mean loss.

        Raises ValueError where it cannot be told of a map.
        """
        ...

    def sums(self, model: nn.Module, places: Mapping[int, int]) -> list[Tensor]:
        """Return the live sums, fp64: processes that measure different batches add theirs."""
        ...


@runtime_checkable
class Beginning(Protocol):
    """A method of which some settings begin from what sites have measured, a version of a `Measuring` method.

    `start` is an adapter of random values then, of the same kind and perhaps of other sizes.
    """

    @property
    def takes(self) -> str:
        """Say what it begins from, as `Measuring.gives` has it; "" where nothing has to be measured."""
        ...

    def begin(
        self, model: nn.Module, places: Mapping[int, int], statistics: Adapter, *, seed: int, tier: Tier = ""
    ) -> Adapter:
        """Return a tier's adapter that changes nothing, made of what was measured of the same model's layers.

        Raises ValueError if `statistics` have nothing of a map, or the map cannot begin from it.
        """
        ...


@runtime_checkable
class Carrying(Protocol):
    """A measuring method that measures at another method's adapter, from which runs of that go on with what it gave."""

    @property
    def carries(self) -> tuple[str, Mapping[str, object]]:
        """The name and the settings of the method whose adapter a version has."""
        ...

    @property
    def gives(self) -> str:
        """Say what its sums are of, as `Measuring` does."""
        ...

    def apart(self, adapter: Adapter, earlier: Tensors) -> tuple[Adapter, Tensors]:
        """Return a version's adapter, and by its keys what was measured of it and on `earlier` tasks.

        Raises ValueError where nothing was measured.
        """
        ...


def takes(method: Method) -> str:
    """Say what a method begins from that sites have to measure before; "" if it is nothing."""
    return method.takes if isinstance(method, Beginning) else ""


class Averaged:
    """What a method declares whose tensors are averaged each by itself and are the same at all sites."""

    spares: ClassVar[frozenset[str]] = frozenset()
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN})
    attaches: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    withheld: ClassVar[frozenset[str]] = frozenset()
    disclosure: ClassVar[Disclosure] = Disclosure.NOTHING

    def tier_at(self, site: str) -> Tier:
        """Return "": all sites train the same."""
        return ""

    def tiers(self) -> frozenset[Tier]:
        """Return the only one."""
        return frozenset({""})

    def schema(self, start: Adapter) -> Schema:
        """Return fields that are averaged each by itself."""
        return {key: Field("F32", tuple(tensor.shape), Rule.MEAN) for key, tensor in start.items()}
