"""The Fisher information of an adapter's values on the sites' data: how much each of them matters to a task.

A run of this method goes on from a version of the method that it is of, and nothing trains: a site adds up, for each
value that does train, the squares of the gradient of each sequence's log-likelihood, and how many targets there were.
That is the empirical Fisher information's diagonal (Kirkpatrick et al., arXiv 1612.00796), by sequence, so that neither
batches nor who holds which rows matter: sums of several sites are those of the pooled data. Divided by the targets, its
quadratic form is how much the mean loss of a target rises, to second order, where the adapter fits the data.

The adapter stays in the version, so that the next task's run goes on from this one, with what was measured: see
`retention.ewc`. Squares of gradients of few rows say how large the gradient of these was, value by value. Neither sites
nor owners allow this method unless they say so, many rows a site hide more than few, and sites may ask for noise.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.emulator import catalogue, modality
from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter, Averaged, Disclosure, Formula, Kind, Method
from offsite.emulator.modality import Batch
from offsite.emulator.retention.base import VALUES, moving
from offsite.kernels.schema import Field, Rule, Schema, Tensors, Tier

SUM, COUNT = "fisher", "fisher.count"  # "28.mlp.down_proj.A.fisher", and of the lowest layer "0.fisher.count"
LIVE = "fisher_sums"  # the attribute of a model that holds them


@dataclass(frozen=True)
class Fisher(Averaged):
    """Measure the Fisher information of another method's adapter."""

    method: str = "lora"
    settings: dict[str, Any] = field(default_factory=dict)
    decay: float = 1.0  # of what was measured on earlier tasks, when this one's is added (arXiv 1805.06370)

    name: ClassVar[str] = "fisher"
    needs: ClassVar[frozenset[str]] = frozenset()  # those of the method that it is of
    rate: ClassVar[float] = 1e-3  # of no bearing: nothing trains
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.SUM, Rule.FIXED})
    attaches: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 1612.00796"
    kind: ClassVar[Kind] = Kind.MEASURED
    formula: ClassVar[Formula] = Formula("layer", "as many as the method", once="1")
    linear: ClassVar[bool] = True  # W stays as it is
    seeded: ClassVar[bool] = False
    disclosure: ClassVar[Disclosure] = Disclosure.NOTHING  # or that of the method

    def __post_init__(self) -> None:
        """Refuse a decay out of range, and a method whose values do not train one by one, at all sites alike."""
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be at least 0 and at most 1, got {self.decay}")
        if not self.of.rules <= VALUES or hasattr(self.of, "gives"):
            raise ValueError(f"method: what {self.method} trains has no values whose gradients are squared")
        if len(self.of.tiers()) > 1 or self.of.withheld & self.settings.keys():
            raise ValueError(f"settings: sites of one tier measure; leave out {', '.join(sorted(self.of.withheld))}")
        object.__setattr__(self, "needs", self.of.needs)  # the dataclass is frozen
        object.__setattr__(self, "spares", self.of.spares)
        object.__setattr__(self, "disclosure", self.of.disclosure)

    @cached_property
    def of(self) -> Method:
        """The method whose adapter is measured."""
        method: Method = catalogue.METHODS.make(self.method, self.settings)
        return method

    @property
    def gives(self) -> str:
        """See `methods.base.Measuring`."""
        return SUM

    @property
    def carries(self) -> tuple[str, dict[str, Any]]:
        """See `methods.base.Carrying`."""
        return self.method, self.settings

    def tier_at(self, site: str) -> Tier:
        """Return the method's only tier."""
        return self.of.tier_at(site)

    def tiers(self) -> frozenset[Tier]:
        """Return it alone."""
        return self.of.tiers()

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if the method cannot train the places."""
        self.of.fits(model, places)

    def schema(self, start: Adapter) -> Schema:
        """Return the adapter's tensors as fixed ones, and a sum for each that trains."""
        adapter = self._adapter(start)
        schema: Schema = {}
        for key, own in self.of.schema(adapter).items():
            shape = tuple(adapter[key].shape)
            schema[key] = Field(own.dtype, shape, Rule.FIXED, below=own.below)
            if own.rule is not Rule.FIXED:
                schema[f"{key}.{SUM}"] = Field("F32", shape, Rule.SUM)
        return schema | {key: Field("F64", (1,), Rule.SUM) for key in start if key.endswith(COUNT)}

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return the method's start with sums of zero: of the same shapes as a version's adapter with these."""
        return self._summed(self.of.start(model, places, seed=seed, tier=tier), places)

    @property
    def takes(self) -> str:
        """See `methods.base.Beginning`."""
        return "adapter"

    def begin(
        self, model: nn.Module, places: Mapping[int, int], statistics: Adapter, *, seed: int, tier: Tier = ""
    ) -> Adapter:
        """Return a version's adapter with sums of zero; raises ValueError if it is none of the method's."""
        start = self.of.start(model, places, seed=seed, tier=tier)
        sizes, sent = ({key: tuple(tensor.shape) for key, tensor in one.items()} for one in (start, statistics))
        if odd := sorted(key for key in sizes.keys() | sent.keys() if sizes.get(key) != sent.get(key)):
            raise ValueError(f"the version has {odd[0]} {sent.get(odd[0])}, and sites train it as {sizes.get(odd[0])}")
        return self._summed(statistics, places)

    def _summed(self, adapter: Adapter, places: Mapping[int, int]) -> Adapter:
        sums = {f"{key}.{SUM}": torch.zeros_like(adapter[key]) for key in moving(self.of.schema(adapter))}
        return {**adapter, **sums, f"{min(places.values())}.{COUNT}": torch.zeros(1, dtype=torch.float64)}

    def _adapter(self, adapter: Adapter) -> Adapter:
        return {key: one for key, one in adapter.items() if not key.endswith((f".{SUM}", COUNT))}

    def apart(self, adapter: Adapter, earlier: Tensors) -> tuple[Adapter, Tensors]:
        """See `methods.base.Carrying`."""
        count = next(float(one) for key, one in adapter.items() if key.endswith(COUNT))
        if count <= 0:
            raise ValueError("no target was measured, so that it is not known what matters")
        own = {key.removesuffix(f".{SUM}"): one for key, one in adapter.items() if key.endswith(f".{SUM}")}
        return self._adapter(adapter), {
            key: (one.double() / count + self.decay * earlier.get(key, torch.zeros(()))).float()
            for key, one in own.items()
        }

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Put the adapter into a model, in place, and the sums beside it; raises ValueError if it does not fit."""
        sums = {key: one.detach().to(torch.float64, copy=True) for key, one in adapter.items() if self._is_sum(key)}
        if strange := [key for key in sums if int(key.partition(".")[0]) not in places.values()]:
            raise ValueError(f"{strange[0]!r}: the layer is none that trains")
        model = self.of.attach(model, places, self._adapter(adapter))
        model.requires_grad_(False)
        setattr(model, LIVE, sums)
        return model

    def _is_sum(self, key: str) -> bool:
        return key.endswith((f".{SUM}", COUNT))

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter and the sums off an attached model as CPU copies, fp32 but for the count."""
        sums = {
            key: one.to(torch.float64 if key.endswith(COUNT) else torch.float32, copy=True)
            for key, one in getattr(model, LIVE).items()
        }
        return {**self.of.state(model, places), **sums}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return nothing: nothing trains."""
        return {}

    def sums(self, model: nn.Module, places: Mapping[int, int]) -> list[Tensor]:
        """See `methods.base.Measuring`; they are on the CPU."""
        return list(getattr(model, LIVE).values())

    def measure(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> float:
        """See `methods.base.Measuring`: a pass and the way back for each sequence, without dropout."""
        live, sums, total = self.of.named_parameters(model, places), getattr(model, LIVE), 0.0
        with _differentiable(model, live):
            for row in range(len(batch.mask)):
                one = batch.share(row, len(batch.mask))
                loss = modality.loss(model, one) * one.targets
                total += float(loss.detach())
                gradients = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
                for key, gradient in zip(live, gradients, strict=True):
                    if gradient is not None:
                        sums[f"{key}.{SUM}"] += gradient.double().square().cpu()
        sums[f"{min(places.values())}.{COUNT}"] += batch.targets
        return total / batch.targets

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Bring the adapter back to the base; sums are of the emulator's values, and stay as they are."""
        sums = {key: one for key, one in adapter.items() if self._is_sum(key)}
        return {**self.of.recover(self._adapter(adapter), recovery), **sums}

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Raise ValueError: no weight changes."""
        raise ValueError(f"{self.name} measures and changes no weight; its sums stay beside the base")

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write adapter and sums in the format of this project."""
        own_format.write(directory, self, adapter, base_name=base_name)


@contextmanager
def _differentiable(model: nn.Module, live: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Have parameters ask for gradients for a while, in a model without dropout."""
    training = model.training
    model.eval()
    for parameter in live.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.train(training)
        for parameter in live.values():
            parameter.requires_grad_(False)
