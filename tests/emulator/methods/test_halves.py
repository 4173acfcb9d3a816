"""Halves: bases that are everybody's, one half at a time, and what comes of them rejoined."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.keyed import Share, fold_keyed
from offsite.emulator import modality, parts
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.halves import basis, rejoined
from offsite.emulator.methods.proof import Witness
from offsite.emulator.parts import Turn
from offsite.emulator.parts.training import Trained, freeze, whole_schema
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.kernels.schema import groups, only

PLACES = {0: 0, 5: 5}
METHOD = make("halves", {"rank": 4})
PATH = "mlp.down_proj"  # (32, 48) of a tiny Llama


def moved(adapter: Adapter, seed: int, half: str = "") -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=draw) if key.endswith(half) else value
        for key, value in adapter.items()
    }


@torch.no_grad()
def weights(adapter: Adapter, tiny: Any) -> list[Tensor]:
    """What an adapter changes of the weights of a map in each layer that trains, in fp64."""
    base, changed = tiny(), tiny()
    METHOD.merge(changed, adapter)
    maps = [[layers(model)[at].get_submodule(PATH).weight.double() for at in PLACES] for model in (changed, base)]
    return [one - other for one, other in zip(*maps, strict=True)]


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (4, 4), (8, 288), (64, 768), (3, 31)])
def test_a_basis_is_orthonormal_and_the_same_for_ever(rank: int, size: int) -> None:
    rows = basis(rank, size)
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=1e-5, rtol=0)
    assert torch.equal(rows[:1], basis(1, size)), "a lower rank has the first rows"
    signs = "".join("+" if one > 0 else "-" for one in basis(1, 16)[0])
    assert signs == "-+--++--+------+", "an adapter means another matrix with other signs"


def test_the_change_is_the_product_without_that_of_the_bases() -> None:
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 25, generator=draw), torch.randn(16, 4, generator=draw)
    P, Q = basis(4, 24), basis(4, 15).T
    A, B = torch.cat([P, down], 1), torch.cat([Q, up])
    expected = B @ A
    expected[:15, :24] = 0
    one, other = rejoined(down, up, 31, 49)
    assert one.shape == (8, 49) and other.shape == (31, 8)
    torch.testing.assert_close(other @ one, expected)
    assert not rejoined(torch.zeros(4, 25), torch.zeros(16, 4), 31, 49).B[15:].any()


@torch.no_grad()
def test_attached_and_merged_and_as_lora_of_twice_the_rank_it_is_the_same_model(
    tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    adapter = moved(METHOD.start(tiny(), PLACES, seed=0), 1)
    logits, merged = METHOD.attach(tiny(), PLACES, adapter)(ids).logits, tiny()
    METHOD.merge(merged, adapter)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    METHOD.export(tmp_path, adapter, base=tiny(), base_name="owner/base")
    exported = PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(exported(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert exported.peft_config["default"].r == 8
    assert not torch.allclose(tiny()(ids).logits, logits, atol=1e-3)


@pytest.mark.parametrize(("half", "number"), [("down", "0"), ("up", "1")])
def test_a_site_trains_one_half_and_the_other_has_no_gradient(tiny: Any, text: Any, half: str, number: str) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    schema = whole_schema(METHOD, start)
    by = parts.make("by-expert", {})
    turns = [by.groups(schema, Turn(0, at, "ward")) for at in (0, 1)]
    assert turns[0] | turns[1] == groups(schema).keys() and not turns[0] & turns[1]
    (own,) = [turn for turn in turns if f"0.{PATH}.{number}" in turn]
    model = METHOD.attach(tiny(), PLACES, start)
    trained = freeze(METHOD.named_parameters(model, PLACES), Trained(only(schema, own)))
    witness = Witness(trained)
    modality.loss(model, text[0]).backward()
    witness.judge()
    assert {key.rpartition(".")[2] for key in trained} == {half} and all(one.grad.any() for one in trained.values())
    others = METHOD.named_parameters(model, PLACES).keys() - trained.keys()
    assert all(METHOD.named_parameters(model, PLACES)[key].grad is None for key in others)


def test_halves_of_two_sites_are_rejoined_as_they_are_and_two_of_one_half_are_averaged_exactly(tiny: Any) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    schema = whole_schema(METHOD, start)
    updates = {"a": moved(start, 1, "down"), "b": moved(start, 2, "up"), "c": moved(start, 3, "up")}
    named = {"a": "0", "b": "1", "c": "1"}
    weighed = {"a": 0.5, "b": 0.3, "c": 0.2}

    def folded(*sites: str) -> Adapter:
        total = sum(weighed[site] for site in sites)
        shares = {
            site: Share(weighed[site] / total, [name for name in groups(schema) if name.endswith(f".{named[site]}")])
            for site in sites
        }
        given = [(Origin(site, "", shares[site].weight), nullcontext(updates[site])) for site in sites]
        return fold_keyed(
            aggregation.make("mean", {}), Version(start, {"": start}), schema, given, tiers=[""], shares=shares
        ).adapter

    both = folded("a", "b")
    assert all(torch.equal(both[key], updates["a" if key.endswith("down") else "b"][key]) for key in both)
    for mean, *sites in zip(
        weights(folded("b", "c"), tiny), *(weights(updates[site], tiny) for site in "bc"), strict=True
    ):
        torch.testing.assert_close(mean, 0.6 * sites[0] + 0.4 * sites[1], atol=1e-7, rtol=1e-4)


def test_halves_that_were_rejoined_learn_more_when_they_train_together(tiny: Any, text: Any) -> None:
    base, start = tiny(), METHOD.start(tiny(), PLACES, seed=0)
    schema, by = whole_schema(METHOD, start), parts.make("by-expert", {})
    samples = [sample for batch in text for sample in batch.samples]

    def trained(adapter: Adapter, names: Any) -> Adapter:
        model = METHOD.attach(copy.deepcopy(base), PLACES, adapter)
        live = freeze(METHOD.named_parameters(model, PLACES), Trained(only(schema, names)))
        tune(model, live, samples, Schedule(6, 5e-3))
        return METHOD.state(model, PLACES)

    @torch.no_grad()
    def loss(adapter: Adapter) -> float:
        return modality.score(METHOD.attach(copy.deepcopy(base), PLACES, adapter), text).mean

    apart = [trained(start, by.groups(schema, Turn(0, at, "ward"))) for at in (0, 1)]
    whole = start | {key: one[key] for one in apart for key in start if not torch.equal(one[key], start[key])}
    assert whole.keys() == start.keys() and not any(torch.equal(whole[key], start[key]) for key in start)
    joint = trained(whole, groups(schema))
    assert loss(joint) < loss(whole) < min(map(loss, apart)) < loss(start)
    assert not any(torch.equal(joint[key], whole[key]) for key in start), "both halves train"


def test_while_both_halves_train_a_mean_is_near_and_no_longer_exact(tiny: Any) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    one, other = moved(start, 1), moved(start, 2)
    mean = {key: (one[key] + other[key]) / 2 for key in start}
    for got, *sites in zip(*(weights(adapter, tiny) for adapter in (mean, one, other)), strict=True):
        exact = (sites[0] + sites[1]) / 2
        # Only U D, where both factors train, is off: by a quarter of the product of what the two differ in.
        corner = (slice(16, None), slice(24, None))
        assert float((got - exact)[corner].norm()) > 0.1 * float(exact[corner].norm())
        rest = (got - exact).clone()
        rest[corner] = 0
        assert float(rest.norm()) < 1e-4 * float(exact.norm())


def test_settings_and_sizes_that_do_not_fit_are_refused(tiny: Any) -> None:
    for settings in ({"rank": 0}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="rank must be at least 1 and alpha positive"):
            make("halves", settings)
    with pytest.raises(ValueError, match=r"rank 17 is more than half of 0\.self_attn\.q_proj has .*, 16, so that no b"):
        make("halves", {"rank": 17}).start(tiny(), PLACES, seed=0)
    start = METHOD.start(tiny(), PLACES, seed=0)
    with pytest.raises(ValueError, match=rf"'5\.{PATH}\.up' \(15, 4\): at rank 4 .* \(32, 48\) has \(16, 4\)"):
        METHOD.attach(tiny(), PLACES, start | {f"5.{PATH}.up": torch.zeros(15, 4)})
    with pytest.raises(ValueError, match="narrower than the base's, of which other rows and columns are the second"):
        METHOD.recover(start, {f"5.{PATH}.shape": torch.tensor([32, 48])})
