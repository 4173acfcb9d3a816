"""How far the adapter that a strategy makes is from the mean of what the sites' adapters do, measured on one layer.

Two sites begin from the same start and take a few steps, each on other tokens. Of what merges it is the mean of the
weights' changes that the aggregate is compared with, of what does not that of the outputs' changes; the error is the
norm of the difference over that of the mean. It depends on how far the sites have gone and how little they agree: those
here agree on nothing, so it says how methods compare, and not what a run of real sites loses.
"""

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.folding import fold
from offsite.emulator import modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.evaluation.size import layer
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.methods.base import Choosing
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Draft
from offsite.emulator.plug import plug

STEPS, ROWS, LENGTH = 20, 2, 16
SITES = ("one", "other")
# A third as wide as SmolLM2-135M is.
SHAPES = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}


def errors(method: Method, strategies: Iterable[str]) -> dict[str, float]:
    """Return the relative error of each strategy, by name."""
    base, draft = layer(method, SHAPES)
    start = method.start(draft.model, draft.outline.places, seed=0)
    text = modality.default().probe(base, rows=ROWS * len(SITES), length=LENGTH)
    adapters = {site: _trained(method, draft, start, text.share(at, len(SITES))) for at, site in enumerate(SITES)}
    effects = [_effect(method, base, draft.recovery, adapter, text) for adapter in adapters.values()]
    mean = torch.stack(effects).mean(0)
    known: list[tuple[Adapter, float]] = []  # many strategies make the same of values

    def error(aggregate: Adapter) -> float:
        for other, measured in known:
            if all(torch.equal(tensor, other[key]) for key, tensor in aggregate.items()):
                return measured
        gap = _effect(method, base, draft.recovery, aggregate, text) - mean
        known.append((aggregate, float(gap.norm() / mean.norm())))
        return known[-1][1]

    return {name: error(_folded(name, method, start, adapters)) for name in strategies}


def _trained(method: Method, draft: Draft, start: Adapter, text: Batch) -> Adapter:
    """Return the adapter after some steps on a text."""
    places = draft.outline.places
    model = method.attach(restack(draft.model, [0]), places, start)
    if isinstance(method, Choosing):
        method.choose(model, places, text)
    optimizer = torch.optim.AdamW(method.named_parameters(model, places).values(), lr=method.rate, weight_decay=0.0)
    for _ in range(STEPS):
        modality.loss(model, text).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return method.state(model, places)


def _folded(name: str, method: Method, start: Adapter, adapters: Mapping[str, Adapter]) -> Adapter:
    updates = (
        (Origin(site, method.tier_at(site), 1 / len(adapters)), nullcontext(adapter))
        for site, adapter in adapters.items()
    )
    strategy = aggregation.make(name, {})
    return fold(strategy, Version(start, {"": start}), method.schema(start), updates, tiers=[""]).adapter


@torch.no_grad()
def _effect(method: Method, base: nn.Module, recovery: Mapping[str, Tensor], adapter: Adapter, text: Batch) -> Tensor:
    """Return what an adapter changes: the weights, one after the other, or the outputs on a text."""
    twin, recovered = copy.deepcopy(base), method.recover(adapter, recovery)
    if not method.mergeable:
        plugged = plug(twin, method, recovered)
        return modality.run(plugged, text).flatten() - modality.run(base, text).flatten()
    method.merge(twin, recovered)
    pairs = zip(twin.parameters(), base.parameters(), strict=True)
    return torch.cat([(after.double() - before.double()).flatten() for after, before in pairs])
