"""LoLDU: that its factors are an LDU factorisation, the same for all, and that the diagonal alone is sent and moves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.formats.packed import dense
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.initial import rounded
from offsite.emulator.methods.loldu import Ldu, factorised
from offsite.emulator.plug import load
from offsite.kernels.schema import settle, size_bytes
from offsite.protos.errors import InputError

PLACES = {0: 0, 4: 4}
CLOSE = {"rtol": 0.0, "atol": 1e-12}
UP = "4.mlp.up_proj"


def matrix(d_out: int, d_in: int) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1))


def moved(adapter: Adapter, seed: int = 1) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=drawn) if key.endswith("diagonal") else value
        for key, value in adapter.items()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("shape", [(12, 12), (12, 7), (7, 12)])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_factors_are_those_of_the_first_pivots_of_a_whole_decomposition(shape: tuple[int, int], rank: int) -> None:
    W = rounded(matrix(*shape))
    L, D, U, rows = factors = factorised(matrix(*shape), rank)
    torch.testing.assert_close(W[:, :rank], L @ D.diag() @ U[:, :rank], **CLOSE)
    torch.testing.assert_close(W[rows], L[rows] @ D.diag() @ U, **CLOSE)
    assert torch.equal(L[rows].triu(), torch.eye(rank).double()) and bool((U.diagonal() == 1).all())
    assert torch.equal(U, U.triu()) and float(L.abs().max()) <= 1, "each pivot is the largest of its column"
    P, whole, upper = torch.linalg.lu(W)
    torch.testing.assert_close(L, (P @ whole)[:, :rank], **CLOSE)
    torch.testing.assert_close(D[:, None] * U, upper[:rank], **CLOSE)
    assert torch.equal(rows, P.argmax(0)[:rank]) and factors.order.shape == (1,)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"rank": 3}, {}])
def test_a_weight_is_what_its_diagonal_makes_of_it_attached_merged_and_loaded(
    family: str, settings: dict[str, Any], tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    method, base, merged = make("loldu", settings), tiny(family), tiny(family)
    adapter = moved(method.start(base, PLACES, seed=0))
    attached = method.attach(tiny(family), PLACES, adapter)(ids).logits
    assert not torch.allclose(attached, base(ids).logits, atol=1e-3)
    method.merge(merged, adapter)
    torch.testing.assert_close(merged(ids).logits, attached, rtol=1e-4, atol=1e-4)
    for key in (key for key in adapter if key.endswith("diagonal")):
        layer, _, path = key.removesuffix(".diagonal").partition(".")
        W, after = (dense(layers(model)[int(layer)].get_submodule(path)) for model in (base, merged))
        factors = factorised(W, len(adapter[key]))
        change = factors.L @ adapter[key].double().diag() @ factors.U
        torch.testing.assert_close(after - W, change.float(), rtol=1e-4, atol=1e-5)
    method.export(tmp_path, adapter, base=tiny(family), base_name="base")
    assert torch.equal(load(tiny(family), tmp_path)(ids).logits, attached)


def test_the_factors_do_not_depend_on_precision_seed_or_which_layers_train(tiny: Any) -> None:
    method = make("loldu", {})
    start = method.start(tiny(), {0: 0, 5: 5}, seed=0)
    narrow = method.start(restack(tiny(), [0, 3, 5]).to(torch.bfloat16), {0: 0, 2: 5}, seed=1)
    assert start.keys() == narrow.keys() and all(torch.equal(start[key], narrow[key]) for key in start)


def test_one_value_for_each_pivot_and_a_check_sum_are_sent_and_beside_a_map_are_two_factors(tiny: Any) -> None:
    method = make("loldu", {"rank": 5})
    start = method.start(tiny(), PLACES, seed=0)
    assert size_bytes(settle(method.schema(start), {key: t.shape for key, t in start.items()})) == 14 * (5 * 4 + 8)
    attached: Any = layers(method.attach(tiny(), PLACES, start))[4].mlp.up_proj
    assert sorted(tuple(one.shape) for one in attached.buffers()) == [(1,), (5, 32), (48, 5)]
    whole = make("loldu", {"rank": 1000}).start(tiny(), PLACES, seed=0)
    assert whole[f"{UP}.diagonal"].shape == (32,), "a map has no more pivots"


def test_the_mean_of_a_round_is_the_mean_of_the_weights_and_other_pivots_have_no_part_in_it(tiny: Any) -> None:
    method, shares = make("loldu", {}), {"clinic": 0.75, "bank": 0.25}
    start = method.start(tiny(), PLACES, seed=0)
    updates = {site: moved(start, seed) for seed, site in enumerate(shares)}
    fold = aggregation.make("mean", {}).begin(Version(start, {"": start}), method.schema(start))
    for site, share in shares.items():
        fold.add(updates[site], Origin(site, "", share))
    with pytest.raises(InputError, match=rf"{UP}\.order is fixed, but another at ward than at others"):
        fold.add(start | {f"{UP}.order": start[f"{UP}.order"] ^ 1}, Origin("ward", "", 0.0))
    merged = {}
    for name, adapter in (updates | {"mean": fold.finish([""]).adapter}).items():
        method.merge(model := tiny(), adapter)
        merged[name] = weights(model)
    for key, tensor in merged["mean"].items():
        torch.testing.assert_close(tensor, sum(share * merged[site][key] for site, share in shares.items()))


def test_an_adapter_whose_pivots_were_other_rows_is_refused_and_nothing_changes(tiny: Any, tmp_path: Path) -> None:
    method, model = make("loldu", {}), tiny()
    before = weights(model)
    start = moved(method.start(model, PLACES, seed=0))
    with torch.no_grad():
        other = tiny()
        layers(other)[4].mlp.up_proj.weight.copy_(matrix(48, 32))
    assert method.start(other, PLACES, seed=0)[f"{UP}.order"] != start[f"{UP}.order"]
    elsewhere = start | {f"{UP}.order": start[f"{UP}.order"] ^ 1}
    for refused in (
        lambda: method.attach(model, PLACES, elsewhere),
        lambda: method.merge(model, elsewhere),
        lambda: method.export(tmp_path, elsewhere, base=model, base_name="base"),
        lambda: method.merge(other, start),
    ):
        with pytest.raises(ValueError, match=r"4\.mlp\.up_proj: other rows are pivots here .* take the base that it"):
            refused()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_the_check_sum_is_of_the_rows_in_their_order() -> None:
    none = torch.empty(0)
    sums = {int(Ldu(none, none, none, torch.tensor(rows)).order) for rows in ([1, 12], [12, 1], [11, 2], [112])}
    assert len(sums) == 4 and all(0 <= one < 1 << 32 for one in sums)


def test_what_cannot_be_trained_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        make("loldu", {"rank": 0})
    method, model = make("loldu", {}), tiny()
    start = method.start(model, PLACES, seed=0)
    with pytest.raises(ValueError, match=r"diagonal' \(33,\) is longer than the map's diagonal, \(32,\)"):
        method.attach(model, PLACES, start | {f"{UP}.diagonal": torch.zeros(33)})
    with pytest.raises(ValueError, match=r"4\.mlp\.up_proj: the emulator's map is narrower .* another method"):
        method.recover(start, {f"{UP}.shape": torch.tensor([48, 32])})
    with torch.no_grad():
        weight = layers(model)[4].mlp.up_proj.weight
        weight[:, 6] = 2 * weight[:, 2]  # also once they are rounded
    with pytest.raises(ValueError, match=r"4\.mlp\.up_proj: column 6 of the matrix \(48, 32\) is .* have rank 6 at"):
        method.start(model, PLACES, seed=0)
    assert make("loldu", {"rank": 6}).start(model, PLACES, seed=0)
