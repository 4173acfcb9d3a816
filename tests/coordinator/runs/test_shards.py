"""A step in parts gives what it gives as a whole, byte for byte, in however many parts it is done."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.memory import MEMORIES
from offsite.coordinator.memory import make as make_memory
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant, Input
from offsite.coordinator.runs.shards import count, in_parts
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.orders import Aggregate, Build, Evaluate, Order, Update
from offsite.coordinator.runs.steps.performing import perform
from offsite.coordinator.runs.steps.results import Folded
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.kernels.schema import Field, Rule, Schema, Tensors, settle
from offsite.protos import tensors, upload
from offsite.protos.documents import from_json, to_json
from offsite.protos.spec import Ancestor, Choice, FileEntry

LAYERS = 5
SCHEMA: Schema = {
    **{f"{n}.q.A": Field("F32", (None, 12), Rule.PRODUCT, f"{n}.q") for n in range(LAYERS)},
    **{f"{n}.q.B": Field("F32", (10, None), Rule.PRODUCT, f"{n}.q") for n in range(LAYERS)},
    "norm": Field("F32", (7,), Rule.MEAN),
}
TIERS = {"bank": "r2", "clinic": "r4", "school": "r2", "town": "r4", "ward": "r2"}


class Round:
    """The updates of sites of two tiers, and a node that folds them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.node = Node(folder / "node", f"file://{folder}/blobs").prepare()
        self._blobs = self.node.blobs()
        (folder / "schema").write_bytes(to_json(SCHEMA))
        starts = {tier: self._store(_adapter(int(tier[1:]), seed=1)) for tier in ("r2", "r4")}
        sent = [
            Update(site=s, digest=self._store(_adapter(int(t[1:]), seed=ord(s[0]))).digest, examples=len(s))
            for s, t in TIERS.items()
        ]
        self.order = Aggregate(
            last=Version(adapter=starts["r4"].digest, broadcast=starts),
            schema=self._blobs.take(folder / "schema")[0],
            tiers=TIERS,
            updates=tuple(sent),
            groups=LAYERS + 1,
        )

    def _store(self, adapter: Tensors) -> Stored:
        tensors.save(self._folder / "file", adapter)
        digest, size = self._blobs.take(self._folder / "file")
        return Stored(digest=digest, size=size)


def _adapter(rank: int, *, seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, 12), "B": (10, rank), "m": (7,)}
    return {name: torch.randn(shapes[name[-1]], generator=draw) for name in SCHEMA}


@pytest.fixture
def round_(tmp_path: Path) -> Round:
    return Round(tmp_path)


def fold(round_: Round, order: Aggregate, spec: Grant, parts: int) -> Folded:
    """Fold in parts, the last part first, and return all of it but times."""

    def do(orders: Sequence[Order]) -> list[bytes]:
        done = [perform(round_.node, one.step, to_json(spec), to_json(one)) for one in reversed(orders)]
        return done[::-1]

    folded = from_json(Folded, in_parts(order, spec, parts, do), where="folded")
    assert len(folded.spans) == parts
    return replace(folded, spans=())


@pytest.mark.parametrize("strategy", ["low-rank", "mean", "factor-mean"])
def test_a_fold_in_parts_is_a_fold(round_: Round, strategy: str) -> None:
    spec, order = Grant(model="m", strategy=Choice(name=strategy)), round_.order
    if strategy != "low-rank":  # means are of one tier
        alike = tuple(update for update in order.updates if TIERS[update.site] == "r2")
        tiers = {update.site: "r2" for update in alike}
        order = replace(order, updates=alike, tiers=tiers)
    whole = fold(round_, order, spec, 1)
    assert not whole.version.sums and ("residual" in whole.version.figures) == (strategy == "low-rank")
    for parts in (2, 3, order.groups):
        assert fold(round_, order, spec, parts) == whole
    again = replace(order, last=whole.version)  # on top of what the first round left to the owner
    second = fold(round_, again, spec, 1)
    assert (second != whole) == (strategy == "low-rank") and fold(round_, again, spec, 3) == second


@pytest.mark.parametrize("name", sorted(name for name, kind in MEMORIES.items() if not kind.divides))
def test_a_memory_takes_the_version_of_all_parts_in_whichever_order_the_updates_came(round_: Round, name: str) -> None:
    spec = Grant(model="m", memory=Choice(name=name), rounds=2, continues=Ancestor(run="old", round=4, rounds=4))
    blobs, scratch = round_.node.blobs(), round_.node.scratch
    begun = memory.begin(blobs, scratch, spec, round_.order.last, round_.order.last, SCHEMA)
    ends = []
    for parts, updates in ((1, round_.order.updates), (3, round_.order.updates[::-1])):
        last, versions = begun, []
        for number in (4, 5):
            order = replace(round_.order, last=last, round=number, updates=updates)
            last = fold(round_, order, spec, parts).version
            versions.append(last)
        ends.append(versions)
    assert ends[0] == ends[1]
    accumulates = make_memory(name, {}).accumulates
    for version in ends[0]:
        assert bool(version.memory) == accumulates and version.bare.state.keys() == {"residual.r2", "residual.r4"}
    plain = fold(round_, replace(round_.order, last=begun.bare), Grant(model="m"), 1).version
    assert (ends[0][0].adapter, ends[0][0].bare.state) == (plain.adapter, plain.state), "a fold sees nothing of it"


def test_sites_go_on_from_what_a_memory_ends_a_run_with_and_the_owner_keeps_the_rest(round_: Round) -> None:
    spec = Grant(model="m", memory=Choice(name="ema"), continues=Ancestor(run="old", round=4, rounds=4))
    begun = memory.begin(round_.node.blobs(), round_.node.scratch, spec, round_.order.last, round_.order.last, SCHEMA)
    folded = fold(round_, round_.order, Grant(model="m"), 1).version
    version = fold(round_, replace(round_.order, last=begun, round=4), spec, 1).version
    assert version.adapter == version.memory["memory.average"] != folded.adapter
    whole = _matrices(_read(round_, version.adapter))
    for tier, sent in version.broadcast.items():
        start, rest = _read(round_, sent.digest), _read(round_, version.state[f"residual.{tier}"])
        assert start["0.q.A"].shape == (int(tier[1:]), 12)
        sums = [a + b for a, b in zip(_matrices(start), _matrices(rest), strict=True)]
        torch.testing.assert_close(sums, whole, rtol=1e-5, atol=1e-5)


def _matrices(adapter: Tensors) -> list[torch.Tensor]:
    return [adapter[f"{n}.q.B"] @ adapter[f"{n}.q.A"] for n in range(LAYERS)]


def test_who_is_left_out_is_judged_by_all_of_an_update(round_: Round) -> None:
    spec, large = Grant(model="m"), {name: 50 * one for name, one in _adapter(2, seed=9).items()}
    harmful = replace(round_.order.updates[0], digest=round_._store(large).digest)
    order = replace(round_.order, updates=(harmful, *round_.order.updates[1:]))
    whole = fold(round_, order, spec, 1)
    assert list(whole.left_out) == ["bank"]
    assert fold(round_, order, spec, 3) == whole


def test_updates_that_went_through_stages_are_folded_in_parts_too(round_: Round, top: Any) -> None:
    spec, updates = Grant(model="m", upload=(Choice(name="top"),)), []
    for update in round_.order.updates:
        sent, start = (
            _read(round_, name) for name in (update.digest, round_.order.last.broadcast[TIERS[update.site]].digest)
        )
        settled = settle(SCHEMA, {name: tensor.shape for name, tensor in start.items()})
        packed = [part.update for part in upload.pack([top()], sent, start, settled, key=bytes(32))]
        stored = round_._store({name: tensor for part in packed for name, tensor in part.items()})
        updates.append(replace(update, digest=stored.digest))
    order = replace(round_.order, updates=tuple(updates))
    assert (
        fold(round_, order, spec, 3) == fold(round_, order, spec, 1) != fold(round_, round_.order, Grant(model="m"), 1)
    )


def _read(round_: Round, digest: str) -> Tensors:
    return tensors.load(round_.node.blobs().path(digest))


def test_as_many_parts_are_made_as_there_are_nodes_and_something_to_divide(round_: Round) -> None:
    spec = Grant(model="m", evaluation={"a": "a.jsonl", "b": "b.jsonl"})
    measure: Any = Evaluate(base=round_.order.schema, manifest=None, adapter=None, recovery=None)
    assert [count(measure, spec, nodes=nodes) for nodes in (0, 1, 2, 9)] == [1, 1, 2, 2]
    assert count(round_.order, spec, nodes=9) == 1, "it is done before another node has begun"
    assert [count(round_.order, spec, nodes=nodes, part=1) for nodes in (1, 4, 9)] == [1, 4, LAYERS + 1]
    files = (FileEntry(path="model.safetensors", digest=measure.base, size=7),)
    gathered = replace(spec, inputs={"m": Input(source="/m", files=files)})
    build = Build(sites=("ward",))
    assert [count(build, gathered, nodes=9, part=part) for part in (8, 3, 1)] == [1, 2, 7]
    assert count(build, spec, nodes=9, part=1) == 1, "of a base that only this node has"
    assert count(replace(round_.order, groups=1), spec, nodes=9, part=1) == 1, "of a strategy that folds all together"
