"""MoSA: experts that have some entries of a matrix each, and sites that train one of them in a round."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.coordinator.aggregation import make as strategy
from offsite.coordinator.aggregation.base import Origin, Version
from offsite.coordinator.aggregation.keyed import Share, fold_keyed
from offsite.emulator import parts
from offsite.emulator.methods import Adapter, make, own_format
from offsite.emulator.methods.mosa import assembled
from offsite.emulator.parts import Turn
from offsite.emulator.plug import load
from offsite.kernels.schema import groups, only

PLACES = {0: 0, 4: 4}
METHOD: Any = make("mosa", {"width": 5, "experts": 3})  # 32 x 5 entries, which three do not divide
NAME = "4.mlp.down_proj"


def moved(adapter: Adapter, *, seed: int) -> Adapter:
    """An adapter that has learned something."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        key: tensor + 0.1 * torch.randn(tensor.shape, generator=drawn) if tensor.is_floating_point() else tensor
        for key, tensor in adapter.items()
    }


def up(adapter: Adapter) -> Tensor:
    return assembled({key.rpartition(".")[2]: t for key, t in adapter.items() if key.startswith(NAME)}, 3)


def test_the_masks_partition_every_matrix_and_are_drawn_from_the_seed(tiny: Any) -> None:
    start, other = (METHOD.start(tiny(), PLACES, seed=seed) for seed in (0, 1))
    for name in sorted({key.rpartition(".")[0] for key in start}):
        masks = torch.zeros(3, 32 * 5, dtype=torch.int32)
        for expert in range(3):
            masks[expert, start[f"{name}.index_{expert}"].long()] = 1
            assert len(start[f"{name}.index_{expert}"]) == len(start[f"{name}.up_{expert}"])
        assert bool((masks.sum(0) == 1).all()) and masks.sum(1).tolist() == [54, 53, 53]
        assert not torch.equal(start[f"{name}.index_0"], other[f"{name}.index_0"])
    assert not torch.equal(start["0.mlp.down_proj.index_0"], start["4.mlp.down_proj.index_0"])


def test_the_union_of_sites_is_the_start_plus_the_sum_of_their_changes(tiny: Any) -> None:
    last = moved(METHOD.start(tiny(), PLACES, seed=0), seed=1)
    schema, part = METHOD.schema(last), parts.make("by-expert", {})
    numbers = {site: _expert(part.groups(schema, Turn(0, 0, site))) for site in map(str, range(20))}
    sites = sorted({number: site for site, number in numbers.items()}.values())  # one for each expert
    assert {*numbers.values()} == {0, 1, 2}
    trained = {site: part.groups(schema, Turn(0, 0, site)) for site in sites}
    adapters = {site: moved(last, seed=at + 2) for at, site in enumerate(sites)}
    updates = [
        (Origin(site, "", 1 / 3), nullcontext({key: adapters[site][key] for key in only(schema, trained[site])}))
        for site in sites
    ]
    shares = {site: Share(1 / 3, trained[site]) for site in sites}
    version = fold_keyed(strategy("mean", {}), Version(last, {"": last}), schema, updates, tiers=[""], shares=shares)
    changes = []
    for site in sites:
        own = {key: adapters[site][key] if key in only(schema, trained[site]) else last[key] for key in last}
        changes.append(up(own) - up(last))
    together = torch.stack([change != 0 for change in changes]).sum(0)
    assert bool((together <= 1).all()) and int(together.sum()) >= 155, "no two sites train the same entry"
    torch.testing.assert_close(up(version.adapter), up(last) + sum(changes), rtol=0, atol=1e-6)


def _expert(trained: frozenset[str]) -> int:
    (number,) = {int(group.rpartition(".")[2]) for group in trained if group.rpartition(".")[2].isdecimal()}
    return number


def test_a_site_takes_the_experts_in_turn_and_always_what_is_no_experts(tiny: Any) -> None:
    schema, part = METHOD.schema(METHOD.start(tiny(), PLACES, seed=0)), parts.make("by-expert", {})
    rounds = [part.groups(schema, Turn(7, number, "ward")) for number in range(4)]
    assert sorted(map(_expert, rounds[:3])) == [0, 1, 2] and rounds[0] == rounds[3]
    common = {group for group in groups(schema) if group.endswith("down")}
    assert common and all(common <= one for one in rounds)
    assert frozenset.union(*rounds) == groups(schema).keys()


@torch.no_grad()
def test_it_leaves_as_one_dense_adapter(tiny: Any, ids: Tensor, tmp_path: Any) -> None:
    adapter = moved(METHOD.start(tiny(), PLACES, seed=0), seed=1)
    METHOD.export(tmp_path, adapter, base=tiny(), base_name="base")
    method, dense = own_format.read(tmp_path)
    plain = make("bottleneck", {"width": 5, "form": "parallel"}).start(tiny(), PLACES, seed=0)
    assert method.name == "bottleneck" and {k: t.shape for k, t in dense.items()} == {
        key: tensor.shape for key, tensor in plain.items()
    }
    expected = METHOD.attach(tiny(), PLACES, adapter)(ids).logits
    torch.testing.assert_close(load(tiny(), tmp_path)(ids).logits, expected)
    assert not torch.allclose(expected, tiny()(ids).logits, atol=1e-3)


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    with pytest.raises(ValueError, match=f"'{NAME}.index_0' .* each of the 160 entries of U once"):
        METHOD.attach(tiny(), PLACES, start | {f"{NAME}.index_1": start[f"{NAME}.index_2"]})
    with pytest.raises(ValueError, match="width and experts must be at least 1, got 64 and 0"):
        make("mosa", {"experts": 0})
    dense = make("bottleneck", {})
    with pytest.raises(ValueError, match="this one has 0; use a method with some"):
        parts.make("by-expert", {}).fits(dense.schema(dense.start(tiny(), PLACES, seed=0)))
