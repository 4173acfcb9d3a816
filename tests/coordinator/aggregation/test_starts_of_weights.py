"""LoRA with a start that is made of the weights: aggregate-then-merge is merge-then-average, round by round."""

from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.emulator.methods import Adapter, Method, make
from offsite.emulator.methods.initial import INITS
from offsite.protos.errors import InputError

WEIGHTS = {"clinic": 0.75, "bank": 0.25}


def moved(adapter: Adapter, seed: int) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    return {
        key: value if key.endswith("0") else value + 0.1 * torch.randn(value.shape, generator=drawn)
        for key, value in adapter.items()
    }


def merged(method: Method, base: Any, adapter: Adapter) -> torch.Tensor:
    method.merge(base, adapter)
    return torch.cat([parameter.detach().double().flatten() for parameter in base.parameters()])


@pytest.mark.parametrize("init", INITS)
def test_the_mean_is_exact_and_every_round_takes_off_the_same_start(init: str, tiny: Any) -> None:
    method, strategy = make("lora", {"rank": 3, "init": init}), aggregation.make("low-rank", {})
    start = method.start(tiny(), {4: 4}, seed=0)
    tier = method.tier_at("clinic")
    version = Version(start, {tier: start})
    for round in range(2):
        updates = {site: moved(version.broadcast[tier], 2 * round + at) for at, site in enumerate(WEIGHTS)}
        fold = strategy.begin(version, method.schema(start))
        for site, weight in WEIGHTS.items():
            fold.add(updates[site], Origin(site, tier, weight))
        left = {key.removeprefix("residual."): value for key, value in version.state.items()}
        version = fold.finish([tier])
        wanted = sum(weight * merged(method, tiny(), updates[site]) for site, weight in WEIGHTS.items())
        if left:  # what the owner kept of the last round is in every plug-in
            kept = {key: left[tier][key] if key in left[tier] else value for key, value in start.items()}
            plain = make("lora", {"rank": 3})
            products = {key: value for key, value in kept.items() if not key.endswith("0")}
            wanted = wanted + merged(plain, tiny(), products) - merged(plain, tiny(), _none(products))
        torch.testing.assert_close(merged(method, tiny(), version.adapter), wanted, rtol=1e-5, atol=1e-5)
        sent = version.broadcast[tier]
        assert all(torch.equal(sent[key], start[key]) for key in start if key.endswith("0"))
        assert {key: value.shape for key, value in sent.items()} == {key: value.shape for key, value in start.items()}
    assert left, "two sites at rank 3 make a mean that rank 3 does not hold"


def _none(adapter: Adapter) -> Adapter:
    return {key: torch.zeros_like(value) for key, value in adapter.items()}


def test_a_site_that_took_off_another_start_is_refused(tiny: Any) -> None:
    method, strategy = make("lora", {"init": "pissa"}), aggregation.make("low-rank", {})
    start = method.start(tiny(), {4: 4}, seed=0)
    fold = strategy.begin(Version(start, {"r8": start}), method.schema(start))
    fold.add(start, Origin("clinic", "r8", 0.5))
    with pytest.raises(InputError, match="A0 is fixed, but another at bank than at others"):
        fold.add({key: 1.01 * value for key, value in start.items()}, Origin("bank", "r8", 0.5))
