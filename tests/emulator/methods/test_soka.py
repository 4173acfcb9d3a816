"""SoKA: that its terms are Kronecker products, the largest of W at first, and that sites' sums are averaged exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.emulator import builders, modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders import Material
from offsite.emulator.formats.packed import dense
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.initial import rounded
from offsite.emulator.methods.soka import Grid
from offsite.emulator.placements import Ends
from offsite.emulator.plug import load

PLACES = {0: 0, 4: 4}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
UP = "4.mlp.up_proj"


def randn(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def moved(adapter: Adapter, seed: int = 1) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    return {
        key: value if key.endswith("0") else value + 0.05 * torch.randn(value.shape, generator=drawn)
        for key, value in adapter.items()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def explicit(B: Tensor, A: Tensor, grid: Grid) -> Tensor:
    """The sum of Kronecker products that two factors stand for, term by term."""
    m, n, p, q = grid
    return torch.stack([torch.kron(u.view(m, n), v.view(p, q)) for u, v in zip(B.T, A, strict=True)]).sum(0)


def test_a_product_of_factors_is_a_sum_of_kronecker_products_cut_into_blocks() -> None:
    grid = Grid(3, 2, 4, 5)
    B, A, x = randn(6, 7), randn(7, 20, seed=2), randn(2, 3, 10, seed=3)
    W = explicit(B, A, grid)
    torch.testing.assert_close(grid.joined(B @ A), W, **CLOSE)
    torch.testing.assert_close(grid.blocked(W), B @ A, **CLOSE)
    torch.testing.assert_close(grid.product(B, A, x), x @ W.T, **CLOSE)


@pytest.mark.parametrize(
    ("size", "grid"), [((576, 576), (24, 24, 24, 24)), ((192, 1536), (12, 32, 16, 48)), ((7, 12), (1, 3, 7, 4))]
)
def test_a_matrix_is_cut_into_about_as_many_blocks_as_these_have_entries(size: Any, grid: Any) -> None:
    assert Grid.of(*size) == grid


def test_a_start_is_the_largest_terms_of_the_weight_with_balanced_factors(tiny: Any) -> None:
    start = make("soka", {"terms": 5}).start(tiny(), PLACES, seed=0)
    W, grid = rounded(dense(layers(tiny())[4].mlp.up_proj)), Grid.of(48, 32)
    A, B = start[f"{UP}.A"].double(), start[f"{UP}.B"].double()
    rest = torch.linalg.svdvals(grid.blocked(W))[5:].norm()
    assert rest * (1 - 1e-6) <= (W - grid.joined(B @ A)).norm() <= 1.001 * rest
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-4, atol=1e-4)
    other = make("soka", {"terms": 5}).start(restack(tiny(), [0, 4]).to(torch.bfloat16), {1: 4}, seed=1)
    assert all(torch.equal(start[key], tensor) for key, tensor in other.items()), "whatever the precision and seed"


@torch.no_grad()
def test_a_weight_is_what_its_terms_make_of_it_attached_merged_and_loaded(
    family: str, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    method, base, merged = make("soka", {"terms": 3}), tiny(family), tiny(family)
    adapter = moved(method.start(base, PLACES, seed=0))
    attached = method.attach(tiny(family), PLACES, adapter)(ids).logits
    assert not torch.allclose(attached, base(ids).logits, atol=1e-3)
    method.merge(merged, adapter)
    torch.testing.assert_close(merged(ids).logits, attached, rtol=1e-4, atol=1e-4)
    for name in (key.removesuffix(".A0") for key in adapter if key.endswith("A0")):
        layer, _, path = name.partition(".")
        before, after = (dense(layers(model)[int(layer)].get_submodule(path)) for model in (base, merged))
        grid = Grid.of(*before.shape)
        sums = [explicit(adapter[f"{name}.B{end}"], adapter[f"{name}.A{end}"], grid) for end in ("", "0")]
        torch.testing.assert_close(after, before + sums[0] - sums[1], **CLOSE)
    method.export(tmp_path, adapter, base=tiny(family), base_name="base")
    assert torch.equal(load(tiny(family), tmp_path)(ids).logits, attached)


@torch.no_grad()
def test_a_start_of_layers_in_few_bits_changes_neither_emulator_nor_base(tiny: Any, ids: Tensor) -> None:
    base, method = tiny(layers=3), make("soka", {})
    material = Material(batches=[modality.default().probe(base, rows=2, length=8)])
    chain = [builders.make("whole", {}), builders.make("quantised", {"layers": "all", "block": 16})]
    draft = builders.run(chain, Ends(1, 1), base, material)
    before, after = draft.model(ids).logits, weights(base)
    start = method.start(draft.model, draft.outline.places, seed=0)
    assert torch.equal(method.attach(draft.model, draft.outline.places, start)(ids).logits, before)
    method.merge(base, method.recover(start, draft.recovery))
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(base).items())


def test_the_mean_is_exact_round_by_round_though_its_terms_are_more_than_a_site_trains(tiny: Any) -> None:
    method, strategy, shares = make("soka", {"terms": 3}), aggregation.make("low-rank", {}), {"a": 0.75, "b": 0.25}
    start = method.start(tiny(), {4: 4}, seed=0)
    version = Version(start, {"": start})
    for round in range(2):
        updates = {site: moved(version.broadcast[""], 2 * round + at) for at, site in enumerate(shares)}
        fold = strategy.begin(version, method.schema(start))
        for site, share in shares.items():
            fold.add(updates[site], Origin(site, "", share))
        left = {key: one for state in version.state.values() for key, one in state.items()}
        version = fold.finish([""])
        assert version.adapter[f"{UP}.B"].shape[1] > 3 and version.broadcast[""][f"{UP}.B"].shape[1] == 3
        for name in (key.removesuffix(".A0") for key in start if key.endswith("A0")):
            mean = version.adapter[f"{name}.B"] @ version.adapter[f"{name}.A"]
            wanted = sum(
                share * updates[site][f"{name}.B"] @ updates[site][f"{name}.A"] for site, share in shares.items()
            )
            if left:  # what the owner kept of the last round
                wanted = wanted + left[f"{name}.B"] @ left[f"{name}.A"]
            torch.testing.assert_close(mean, wanted, **CLOSE)
        assert all(torch.equal(version.adapter[key], start[key]) for key in start if key.endswith("0"))
        method.merge(tiny(), version.adapter)  # which has more terms than it takes off
    assert left


def test_what_cannot_be_trained_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="terms must be at least 1, got 0"):
        make("soka", {"terms": 0})
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj \(32, 32\), as 4 x 4 blocks of 8 x 8, is a sum of 16 "):
        make("soka", {"terms": 17}).fits(tiny(), PLACES)
    method, model = make("soka", {"terms": 2}), tiny()
    start = method.start(model, PLACES, seed=0)
    fewer = {f"{UP}.{part}": torch.zeros(12, 2) for part in ("B", "B0")}
    with pytest.raises(ValueError, match=r"4\.mlp\.up_proj \(48, 32\) is cut into 24 blocks of 64 entries, .* 12 and"):
        method.attach(model, PLACES, start | fewer)
    with pytest.raises(ValueError, match=r"4\.mlp\.up_proj: the emulator's map is narrower .* another method"):
        method.recover(start, {f"{UP}.shape": torch.tensor([48, 32])})
