"""APET: chance places a budget of values, as pairs and as whole matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.coordinator.aggregation import make as strategy
from offsite.coordinator.aggregation.base import Origin, Version
from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.methods import Adapter, make

PLACES = {0: 0, 4: 4}
ENTRIES = 2 * 7680  # of the maps of two layers


def values(adapter: Adapter) -> int:
    return sum(tensor.numel() for tensor in adapter.values())


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_the_values_are_within_the_budget_and_nearly_all_of_it_and_drawn_from_the_seed(share: float, tiny: Any) -> None:
    base, method = tiny(), make("apet", {"share": share, "rank": 4})
    assert sum(layers(base)[0].get_submodule(path).weight.numel() for path in linears(layers(base)[0])) * 2 == ENTRIES
    starts = [method.start(base, PLACES, seed=seed) for seed in range(4)]
    for start in starts:
        assert 0.9 * share * ENTRIES <= values(start) <= share * ENTRIES
        assert {key.partition(".")[0] for key in start} == {"0", "4"}
        assert {key.rpartition(".")[2] for key in start} == {"A", "B", "change"}
    matrices = [sum(tensor.numel() for key, tensor in one.items() if key.endswith("change")) for one in starts]
    assert all(0.1 <= count / (share * ENTRIES) <= (0.7 if share < 0.5 else 1) for count in matrices)
    assert len({tuple(start) for start in starts}) == len(starts)


def test_it_is_the_same_in_an_emulator_where_the_same_layers_train(tiny: Any) -> None:
    method = make("apet", {"share": 0.25})
    here, there = method.start(tiny(), PLACES, seed=3), method.start(tiny(layers=2), {0: 0, 1: 4}, seed=3)
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


def test_one_pair_in_each_layer_has_room_at_a_lower_rank_or_is_refused(tiny: Any) -> None:
    assert {len(t) for k, t in make("apet", {"share": 0.03}).start(tiny(), PLACES, seed=0).items() if k[-1] == "A"} == {
        1
    }
    with pytest.raises(ValueError, match="is 154 values, .* rank 1 in each of 2 layers, which takes 160; raise share"):
        make("apet", {"share": 0.01}).fits(tiny(), PLACES)
    with pytest.raises(ValueError, match="above 0 and at most 1; got 0"):
        make("apet", {"share": 0.0})
    with pytest.raises(ValueError, match="rank must be at least 1 and scale positive, got 0 and 2.0"):
        make("apet", {"rank": 0})


def weights(method: Any, model: Any, adapter: Adapter) -> dict[str, Tensor]:
    method.merge(model, adapter)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_average_of_a_round_is_the_mean_of_the_weights(tiny: Any, family: str) -> None:
    method, shares = make("apet", {"share": 0.25}), {"a": 0.5, "b": 0.3, "c": 0.2}
    start = method.start(tiny(family), PLACES, seed=0)
    drawn = torch.Generator().manual_seed(0)
    adapters = {
        site: {key: tensor + 0.1 * torch.randn(tensor.shape, generator=drawn) for key, tensor in start.items()}
        for site in shares
    }
    fold = strategy("low-rank", {}).begin(Version(start, {"": start}), method.schema(start))
    for site, adapter in adapters.items():
        fold.add(adapter, Origin(site, "", shares[site]))
    together = weights(method, tiny(family), fold.finish([""]).adapter)
    apart = {site: weights(method, tiny(family), adapter) for site, adapter in adapters.items()}
    for key, tensor in together.items():
        mean = sum(share * apart[site][key] for site, share in shares.items())
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-5)


def test_a_map_with_a_part_of_a_pair_or_with_both_is_refused(tiny: Any) -> None:
    method = make("apet", {"share": 0.25})
    start = method.start(tiny(), PLACES, seed=0)
    name = next(key.removesuffix(".A") for key in start if key.endswith(".A"))
    with pytest.raises(ValueError, match=f"{name} takes A, B, the adapter has A"):
        method.attach(tiny(), PLACES, {key: tensor for key, tensor in start.items() if key != f"{name}.B"})
    with pytest.raises(ValueError, match=f"{name} takes change, the adapter has A, B, change"):
        method.attach(tiny(), PLACES, start | {f"{name}.change": torch.zeros(1, 1)})
