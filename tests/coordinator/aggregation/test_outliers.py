"""A harmful update under the absolute bound is left out by its size beside the others'."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.aggregation.outliers import Change, outliers
from offsite.coordinator.home import Home
from offsite.coordinator.runs.steps.folding import aggregate
from offsite.coordinator.runs.steps.orders import Aggregate, Update
from offsite.coordinator.store.blobs import Stored
from offsite.protos import tensors
from offsite.protos.errors import RunError
from offsite.protos.spec import Choice, RunSpec

SITES = ["bank", "clinic", "school", "town"]


def judged(*norms: float, ranks: tuple[int, ...] = (4, 4, 4, 4)) -> list[str]:
    changes = {site: Change(norm, rank) for site, norm, rank in zip(SITES, norms, ranks, strict=False)}
    return list(outliers(changes, ratio=5.0))


def test_an_update_is_held_against_the_median_of_its_rank() -> None:
    assert judged(1.0, 2.0, 1.5, 7.5) == []
    assert judged(1.0, 2.0, 1.5, 10.1) == ["town"]
    assert judged(900.0, 1.0, 1.0) == ["bank"]
    assert judged(900.0, 1.0) == [], "of two it cannot be told which one is odd"
    assert judged(1.0, 1.0, 1.0, 99.0, ranks=(4, 4, 4, 8)) == [], "another rank has another size"
    assert judged(0.0, 0.0, 0.0, 1.0) == []


@pytest.fixture
def round_(tmp_path: Path) -> dict[str, Any]:
    """What four sites sent, the last a thousand times as large as the others."""
    home = Home(tmp_path / "home", tmp_path).prepare()
    blobs, rows = home.blobs(), {}

    def store(name: str, size: float) -> str:
        draw = torch.Generator().manual_seed(len(name))
        adapter = {"0.q.A": torch.randn(2, 6, generator=draw), "0.q.B": torch.randn(6, 2, generator=draw)}
        tensors.save(tmp_path / name, {key: size * tensor for key, tensor in adapter.items()})
        return str(blobs.take(tmp_path / name)[0])

    start = Stored(digest=store("start", 0.0), size=1)
    for site, size in zip(SITES, (1.0, 1.1, 0.9, 100.0), strict=True):
        rows[site] = Update(site=site, digest=store(site, size), examples=8)
    return {"home": home, "broadcast": dict.fromkeys(SITES, start), "updates": rows}


def order(round_: dict[str, Any], senders: list[str]) -> Aggregate:
    updates = tuple(round_["updates"][site] for site in senders)
    return Aggregate(residual={}, broadcast=round_["broadcast"], updates=updates, sites=tuple(SITES))


def test_the_others_are_averaged_as_if_the_harmful_one_had_never_come(round_: dict[str, Any]) -> None:
    spec = RunSpec(model="m", method=Choice(name="lora", settings={"rank": 2}))
    all_four = aggregate(round_["home"], spec, order(round_, SITES))
    honest = aggregate(round_["home"], spec, order(round_, SITES[:3]))
    assert all_four.exact == honest.exact and all_four.lineage == honest.lineage
    assert list(all_four.left_out) == ["town"] and "times the round's median" in all_four.left_out["town"]
    assert not honest.left_out


def test_who_is_left_out_does_not_count_as_a_site(round_: dict[str, Any]) -> None:
    spec = RunSpec(model="m", method=Choice(name="lora", settings={"rank": 2}), min_sites=4)
    with pytest.raises(RunError, match="3 of at least 4 updates are left in the round .town: its update changed"):
        aggregate(round_["home"], spec, order(round_, SITES))
