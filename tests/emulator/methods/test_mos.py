"""MoS: which shards make which factors, whose gradients reach them, and what is left of the pools outside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.runs.pairs import is_exact
from offsite.emulator import modality, parts
from offsite.emulator.anatomy.structure import find, layers, linears, shape
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import Place
from offsite.emulator.methods.mos import INDICES, POOLS, Mos, materialise
from offsite.emulator.methods.proof import Witness
from offsite.emulator.parts import Turn
from offsite.emulator.parts.training import Trained, freeze, whole_schema
from offsite.emulator.plug import load
from offsite.kernels.schema import groups, only, size_bytes

PLACES = {0: 0, 2: 2, 5: 5}
SETTINGS = {"budget": 2, "rank": 4, "shards": 4, "private": 1}
METHOD = make("mos", SETTINGS)
PATH = "mlp.down_proj"  # (32, 48) of a tiny Llama


def moved(adapter: Adapter, seed: int = 1) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=drawn) if value.is_floating_point() else value
        for key, value in adapter.items()
    }


def pools(adapter: Adapter) -> Adapter:
    return {key: value for key, value in adapter.items() if key.rpartition(".")[2] in POOLS}


@pytest.mark.parametrize("settings", [{}, SETTINGS, {"rank": 2, "private": 2, "shards": 1}, {"rank": 7, "private": 0}])
def test_as_many_values_train_as_lora_of_the_budget_has_whatever_else_is_set(tiny: Any, settings: Any) -> None:
    model = tiny()
    trained = pools(make("mos", settings).start(model, PLACES, seed=0))
    maps = [find(model).layers[0].get_submodule(path) for path in linears(layers(model)[0])]
    assert sum(pool.numel() for pool in trained.values()) == 2 * len(PLACES) * sum(sum(shape(one)) for one in maps)
    lora = make("lora", {"rank": 2}).start(model, PLACES, seed=0)
    assert sum(pool.numel() for pool in trained.values()) == sum(factor.numel() for factor in lora.values())
    assert {key.partition(".")[0] for key in trained} == {"0"}  # the lowest layer has them for all


def test_a_row_of_a_factor_is_its_shards_side_by_side(tiny: Any) -> None:
    adapter = moved(METHOD.start(tiny(), PLACES, seed=0))
    A, B = materialise(adapter)[Place(2, PATH)]
    assert A.shape == (4, 48) and B.shape == (32, 4)
    for factor, pool, index, width in ((A, "pool_A", "index_A", 12), (B.T, "pool_B", "index_B", 8)):
        for row in range(4):
            for at in range(4):
                shard = adapter[f"0.{PATH}.{pool}"][int(adapter[f"2.{PATH}.{index}"][row, at])]
                assert torch.equal(factor[row, at * width : (at + 1) * width], shard)


def test_common_shards_are_taken_once_a_layer_and_private_ones_by_one_layer_in_all(tiny: Any) -> None:
    model = tiny()
    start, again, other = (METHOD.start(model, PLACES, seed=seed) for seed in (0, 0, 1))
    common = (2 - 1) * 3 * 4
    for name in INDICES:
        taken = [start[f"{layer}.{PATH}.{name}"] for layer in PLACES]
        assert all(len(index[:3].unique()) == 12 and int(index[:3].max()) < common for index in taken)
        assert [index[3].tolist() for index in taken] == [[*range(n, n + 4)] for n in (12, 16, 20)]
        assert not torch.equal(taken[0], taken[1])
        assert all(torch.equal(start[key], again[key]) for key in start)
        assert not torch.equal(taken[0], other[f"0.{PATH}.{name}"])
    assert not torch.equal(*(start[f"0.{PATH}.{name}"] for name in INDICES))


def test_a_layer_that_asks_for_more_shards_than_there_are_takes_all_of_them_about_as_often(tiny: Any) -> None:
    start = make("mos", {**SETTINGS, "rank": 8}).start(tiny(), {0: 0}, seed=0)
    counts = start[f"0.{PATH}.index_A"][:7].flatten().bincount(minlength=4)
    assert counts.tolist() == [7] * 4
    start = make("mos", {**SETTINGS, "rank": 8, "shards": 2}).start(tiny(), {0: 0, 1: 1, 3: 3}, seed=0)
    counts = start[f"3.{PATH}.index_B"][:7].flatten().bincount(minlength=6)
    assert sorted(counts.tolist()) == [2, 2, 2, 2, 3, 3]


def test_gradients_reach_the_shards_that_are_taken_from_every_layer_that_takes_them(tiny: Any, text: Any) -> None:
    adapter = moved(METHOD.start(tiny(), PLACES, seed=0))
    model = METHOD.attach(tiny(), PLACES, adapter)
    modality.loss(model, text[0]).backward()
    ours = METHOD.named_parameters(model, PLACES)
    assert ours.keys() == pools(adapter).keys()
    factors = {
        place.key(name): one for place, pair in materialise(adapter).items() for name, one in pair._asdict().items()
    }
    lora = make("lora", {"rank": 4, "alpha": METHOD.alpha})
    plain = lora.attach(tiny(), PLACES, factors)
    modality.loss(plain, text[0]).backward()
    gradients = {key: one.grad for key, one in lora.named_parameters(plain, PLACES).items()}
    for name, part in (("A", "pool_A"), ("B", "pool_B")):
        pool = ours[f"0.{PATH}.{part}"].grad
        expected = torch.zeros_like(pool)
        for layer in PLACES:
            gradient = gradients[f"{layer}.{PATH}.{name}"]
            rows = gradient if name == "A" else gradient.T
            expected.index_add_(0, adapter[f"{layer}.{PATH}.index_{name}"].flatten(), rows.reshape(16, -1))
        torch.testing.assert_close(pool, expected, rtol=1e-4, atol=1e-6)
        taken = torch.cat([adapter[f"{layer}.{PATH}.index_{name}"].flatten() for layer in PLACES]).unique()
        assert {*pool.any(1).nonzero().flatten().tolist()} == {*taken.tolist()}


@torch.no_grad()
def test_a_private_row_changes_the_map_of_one_layer_and_no_other(tiny: Any) -> None:
    base, adapter = tiny(), METHOD.start(tiny(), PLACES, seed=0)
    adapter[f"0.{PATH}.pool_B"][16:20] = 1.0  # those of layer 2, the second that trains
    METHOD.merge(base, adapter)
    both = zip(layers(base), layers(tiny()), strict=True)
    moved = [not torch.equal(one.mlp.down_proj.weight, other.mlp.down_proj.weight) for one, other in both]
    assert moved == [False, False, True, False, False, False]


@torch.no_grad()
def test_attached_and_merged_and_as_lora_in_stock_peft_it_is_the_same_model(
    family: str, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    adapter, merged = moved(METHOD.start(tiny(family), PLACES, seed=0)), tiny(family)
    attached = METHOD.attach(tiny(family), PLACES, adapter)
    logits = attached(ids).logits
    state = METHOD.state(attached, PLACES)
    assert state.keys() == adapter.keys() and all(torch.equal(state[key], adapter[key]) for key in state)
    METHOD.merge(merged, adapter)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    METHOD.export(tmp_path, adapter, base=tiny(family), base_name="owner/base")
    for model in (PeftModel.from_pretrained(tiny(family), tmp_path), load(tiny(family), tmp_path)):
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tiny(family)(ids).logits, logits, atol=1e-3)


def test_where_every_row_is_private_and_whole_it_is_lora(tiny: Any, text: Any) -> None:
    lora = make("lora", {"rank": 2, "alpha": 6.0})
    plain = moved(lora.start(tiny(), PLACES, seed=0))
    method = make("mos", {"budget": 2, "rank": 2, "shards": 1, "private": 2, "alpha": 6.0})
    adapter = method.start(tiny(), PLACES, seed=0)
    for place in materialise(adapter):
        own = slice(at := 2 * sorted(PLACES).index(place.layer), at + 2)
        adapter[f"0.{place.path}.pool_A"][own] = plain[place.key("A")]
        adapter[f"0.{place.path}.pool_B"][own] = plain[place.key("B")].T
    models = (method.attach(tiny(), PLACES, adapter), lora.attach(tiny(), PLACES, plain))
    one, other = (modality.loss(model, text[0]) for model in models)
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, modality.loss(tiny(), text[0]), atol=1e-3)


def test_the_mean_of_two_sites_is_the_mean_of_their_pools_and_is_called_near(tiny: Any) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    updates = {0.75: moved(start, seed=1), 0.25: moved(start, seed=2)}
    for name in ("mean", "low-rank"):
        strategy = aggregation.make(name, {})
        fold = strategy.begin(Version(start, {"": start}), METHOD.schema(start))
        for weight, update in updates.items():
            fold.add(update, Origin(f"{weight}", "", weight))
        mean = fold.finish([""]).adapter
        for key, tensor in mean.items():
            expected = sum(weight * update[key] for weight, update in updates.items()) if "pool" in key else start[key]
            torch.testing.assert_close(tensor, expected)
        assert not is_exact(METHOD, strategy)


@torch.no_grad()
def test_pools_that_are_cut_are_the_same_shards_and_the_same_model_bit_for_bit(tiny: Any, ids: Tensor) -> None:
    cut = make("mos", SETTINGS | {"pools": 5})
    whole, start = METHOD.start(tiny(), PLACES, seed=0), cut.start(tiny(), PLACES, seed=0)
    for name in POOLS:
        pieces = [start[f"0.{PATH}.{name}_{at}"] for at in range(5)]
        assert [len(piece) for piece in pieces] == [5, 5, 5, 5, 4]
        assert torch.equal(torch.cat(pieces), whole[f"0.{PATH}.{name}"])
    adapter = moved(start)
    joined = {key: value for key, value in adapter.items() if "pool" not in key}
    for key in whole.keys() - joined.keys():
        joined[key] = torch.cat([adapter[f"{key}_{at}"] for at in range(5)])
    model = cut.attach(tiny(), PLACES, dict(sorted(adapter.items(), reverse=True)))  # a file has an order of its own
    assert torch.equal(model(ids).logits, METHOD.attach(tiny(), PLACES, joined)(ids).logits)
    state = cut.state(model, PLACES)
    assert state.keys() == adapter.keys() and all(torch.equal(state[key], adapter[key]) for key in state)


def test_pools_of_one_number_are_a_group_and_the_last_have_the_private_shards(tiny: Any) -> None:
    cut = make("mos", SETTINGS | {"pools": 5})
    start = cut.start(tiny(), PLACES, seed=0)
    schema = whole_schema(cut, start)
    assert groups(schema)[f"0.{PATH}.2"] == [f"0.{PATH}.pool_A_2", f"0.{PATH}.pool_B_2"]
    assert [schema[f"0.{PATH}.pool_A_{at}"].private for at in range(5)] == [0, 0, 3, 5, 4]
    assert schema[f"2.{PATH}.index_B"].below == 24
    handed = parts.make("by-capability", {"shards": 5, "sites": {"clinic": 2, "phone": 1, "ward": 2}})
    own = {site: only(schema, handed.groups(schema, Turn(0, 3, site))) for site in ("clinic", "phone", "ward")}
    assert sorted(key for keys in own.values() for key in keys) == sorted(schema.keys() - _indices(start))
    sizes = {site: size_bytes(keys) for site, keys in own.items()}
    assert sizes["phone"] < 0.25 * sum(sizes.values()) < sizes["clinic"]


def test_a_pool_that_does_not_train_has_no_gradient_and_keeps_its_bytes(tiny: Any, text: Any) -> None:
    cut = make("mos", SETTINGS | {"pools": 5})
    start = cut.start(tiny(), PLACES, seed=0)
    schema = whole_schema(cut, start)
    part = Trained(only(schema, parts.make("by-expert", {}).groups(schema, Turn(0, 0, "ward"))))
    model = cut.attach(tiny(), PLACES, start)
    trained = freeze(cut.named_parameters(model, PLACES), part)
    witness = Witness(trained)
    modality.loss(model, text[0]).backward()
    witness.judge()
    torch.optim.SGD(cut.named_parameters(model, PLACES).values(), lr=1.0).step()
    state = cut.state(model, PLACES)
    still = {key for key in state if torch.equal(state[key], start[key])}
    assert {key for key in state if key.rpartition("_")[2] == min(trained)[-1]} >= state.keys() - still
    assert sum("pool_B" in key for key in state.keys() - still) == len(linears(layers(tiny())[0]))


def _indices(adapter: Adapter) -> set[str]:
    return {key for key in adapter if key.rpartition(".")[2] in INDICES}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"budget": 0}, r"budget must be in 1\.\.rank, got 0 and rank 8"),
        ({"budget": 9}, r"budget must be in 1\.\.rank, got 9 and rank 8"),
        ({"private": 3}, r"private must be in 0\.\.budget, got 3 and budget 2"),
        ({"private": 2}, "leaves no common shards for the other 6 rows of each layer; lower private"),
        ({"pools": 0}, r"pools must be in 1\.\.budget \* shards = 8, got 0"),
        ({"pools": 9}, r"pools must be in 1\.\.budget \* shards = 8, got 9"),
        ({"shards": 0}, "shards must be at least 1"),
        ({"alpha": 0.0}, "alpha positive"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=f"method 'mos': .*{fault}"):
        make("mos", settings)


def test_maps_that_shards_do_not_divide_or_that_are_unlike_are_refused_by_name(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj has .* \(32, 32\), which 5 shards do not divide"):
        make("mos", {"shards": 5}).fits(tiny(), PLACES)
    model = tiny()
    layers(model)[2].mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(ValueError, match=r"2\.mlp\.up_proj has .* \(64, 32\) and 0\.mlp\.up_proj has \(48, 32\)"):
        METHOD.fits(model, PLACES)
    make("mos", {"modules": ("down_proj",)}).fits(model, PLACES)


def test_an_adapter_that_is_none_is_refused_with_what_is_wrong(tiny: Any) -> None:
    start, model = METHOD.start(tiny(), PLACES, seed=0), tiny()
    size = len(start[f"0.{PATH}.pool_A"])
    index = start[f"2.{PATH}.index_B"]
    for change, fault in (
        ({f"2.{PATH}.index_B": index + size}, rf"2\.{PATH}\.index_B .* in 0\.\.{size - 1},"),
        ({f"2.{PATH}.index_B": index[:2]}, rf"2\.{PATH}\.index_B \(2, 4\): .* \(4, 4\)"),
        ({f"2.{PATH}.pool_A": start[f"0.{PATH}.pool_A"]}, rf"2\.{PATH} has index_A, .* the lowest, 0, has pool_A"),
        ({f"0.{PATH}.pool_B": torch.zeros(size, 9)}, r"do not fit a linear map of \(d_out, d_in\) = \(32, 48\)"),
        ({f"2.{PATH}.C": index}, rf"'2\.{PATH}\.C'.*pool_A"),
    ):
        with pytest.raises(ValueError, match=fault):
            METHOD.attach(model, PLACES, start | change)
    with pytest.raises(ValueError, match=r"for layers \[0, 2, 5\], but those that train are \[0, 2\]"):
        METHOD.attach(model, {0: 0, 2: 2}, start)
    METHOD.attach(model, PLACES, start)  # which none of these has changed


def test_a_narrowed_map_is_refused_for_its_pools_would_fit_other_columns(tiny: Any) -> None:
    start = METHOD.start(tiny(), PLACES, seed=0)
    assert METHOD.recover(start, {f"3.{PATH}.shape": torch.tensor([32, 48])}) == start
    with pytest.raises(ValueError, match=rf"2\.{PATH}: the emulator's map is narrower .* another method"):
        METHOD.recover(start, {f"2.{PATH}.shape": torch.tensor([32, 48])})


def test_the_pools_of_a_layer_lie_where_the_base_has_it_and_not_where_the_emulator_has(tiny: Any, ids: Tensor) -> None:
    method: Mos = make("mos", SETTINGS)
    start = method.start(tiny(layers=3), {0: 4, 2: 11}, seed=0)
    assert {key.partition(".")[0] for key in pools(start)} == {"4"}
    assert start.keys() == method.state(method.attach(tiny(layers=3), {0: 4, 2: 11}, start), {0: 4, 2: 11}).keys()
