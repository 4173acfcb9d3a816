"""A harmful update under the absolute bound is left out by its size beside the others'."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.aggregation.outliers import Change, outliers
from offsite.coordinator.home import Home
from offsite.coordinator.runs.steps import folding
from offsite.coordinator.runs.steps.folding import aggregate
from offsite.coordinator.runs.steps.orders import Aggregate, Update
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.kernels.schema import Field, Rule, Schema
from offsite.protos import tensors
from offsite.protos.documents import to_json
from offsite.protos.errors import RunError
from offsite.protos.spec import RunSpec

SITES = ["bank", "clinic", "school", "town"]
SCHEMA: Schema = {
    "0.q.A": Field("F32", (None, 6), Rule.PRODUCT, "0.q"),
    "0.q.B": Field("F32", (6, None), Rule.PRODUCT, "0.q"),
}


def judged(*norms: float, last: str = "r4") -> list[str]:
    tiers = ("r4", "r4", "r4", last)
    changes = {site: Change(norm, tier) for site, norm, tier in zip(SITES, norms, tiers, strict=False)}
    return list(outliers(changes, ratio=5.0))


def test_an_update_is_held_against_the_median_of_its_tier() -> None:
    assert judged(1.0, 2.0, 1.5, 7.5) == []
    assert judged(1.0, 2.0, 1.5, 10.1) == ["town"]
    assert judged(900.0, 1.0, 1.0) == ["bank"]
    assert judged(900.0, 1.0) == [], "of two it cannot be told which one is odd"
    assert judged(1.0, 1.0, 1.0, 99.0, last="r8") == [], "another tier has another size"
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

    (tmp_path / "schema").write_bytes(to_json(SCHEMA))
    start = Stored(digest=store("start", 0.0), size=1)
    last = Version(adapter=start.digest, broadcast={"r2": start})
    for site, size in zip(SITES, (1.0, 1.1, 0.9, 100.0), strict=True):
        rows[site] = Update(site=site, digest=store(site, size), examples=8)
    return {"home": home, "last": last, "schema": blobs.take(tmp_path / "schema")[0], "updates": rows}


def order(round_: dict[str, Any], senders: list[str]) -> Aggregate:
    updates = tuple(round_["updates"][site] for site in senders)
    tiers = dict.fromkeys(SITES, "r2")
    return Aggregate(last=round_["last"], schema=round_["schema"], tiers=tiers, updates=updates)


def test_the_others_are_averaged_as_if_the_harmful_one_had_never_come(round_: dict[str, Any]) -> None:
    spec = RunSpec(model="m")
    all_four = aggregate(round_["home"].node, spec, order(round_, SITES))
    honest = aggregate(round_["home"].node, spec, order(round_, SITES[:3]))
    assert all_four.version == honest.version and all_four.lineage == honest.lineage
    assert list(all_four.left_out) == ["town"] and "times the round's median" in all_four.left_out["town"]
    assert not honest.left_out


def test_who_is_left_out_does_not_count_as_a_site(round_: dict[str, Any]) -> None:
    spec = RunSpec(model="m", min_sites=4)
    with pytest.raises(RunError, match="3 of at least 4 updates are left in the round .town: its update changed"):
        aggregate(round_["home"].node, spec, order(round_, SITES))


def test_what_is_known_since_an_update_was_accepted_is_not_measured_again(
    round_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(*files: Any) -> float:
        raise AssertionError(f"{files} are read")

    asked, node = order(round_, SITES), round_["home"].node
    measured = aggregate(node, RunSpec(model="m"), asked)
    monkeypatch.setattr(folding, "distance", distance)
    known = [replace(update, norm=norm) for update, norm in zip(asked.updates, (1.0, 1.1, 0.9, 100.0), strict=True)]
    told = aggregate(node, RunSpec(model="m"), replace(asked, updates=tuple(known)))
    assert (told.version, told.lineage, [*told.left_out]) == (measured.version, measured.lineage, ["town"])
    known[0] = replace(known[0], norm=None)  # of an older journal
    with pytest.raises(AssertionError, match="are read"):
        aggregate(node, RunSpec(model="m"), replace(asked, updates=tuple(known)))
