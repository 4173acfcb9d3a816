"""The fold of a round: bit for bit as of whole tensors, whoever was first, and of nothing that changed on the disk."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.aggregation import Origin
from offsite.coordinator.aggregation.mean import Mean
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps import storage
from offsite.coordinator.runs.steps.folding import AHEAD, Ahead, aggregate, compare
from offsite.coordinator.runs.steps.orders import Aggregate, Compare, Update
from offsite.coordinator.runs.steps.results import LatePart
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store import blobs
from offsite.coordinator.store.blobs import Stored
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos import tensors
from offsite.protos.documents import to_json
from offsite.protos.errors import InputError, MismatchError
from offsite.protos.spec import Choice

BLOCK_BYTES = 1 << 14  # of a file at a time, in place of a million
SIZES = (0, 1, BLOCK_BYTES // 4, BLOCK_BYTES // 4 + 1, tensors.ALONE + 1)  # values, around where files are cut
SCHEMA: Schema = {
    **{
        f"{dtype}.{size}": Field(dtype, (size,), Rule.MEAN) for dtype in ("F64", "F32", "F16", "BF16") for size in SIZES
    },
    "index": Field("I32", (3,), Rule.FIXED, below=9),
}
SMALL = {key: field for key, field in SCHEMA.items() if field.size_bytes < BLOCK_BYTES}
SITES = ("bank", "clinic", "school", "town")
SPEC = Grant(model="m", strategy=Choice(name="mean"))
ORIGIN = Origin("ward", "", 0.25)


def adapter(seed: int, schema: Schema = SCHEMA) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    values = {key: torch.randn(field.shape, generator=draw) for key, field in schema.items() if key != "index"}
    return {key: one.to(tensors.DTYPES[schema[key].dtype]) for key, one in values.items()} | {
        "index": torch.tensor([3, 0, 8], dtype=torch.int32)
    }


class Round:
    """The updates of some sites, and a node that folds them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.node = Node(folder / "node", f"file://{folder}/blobs").prepare()
        self.blobs = self.node.blobs()
        (folder / "schema").write_bytes(to_json(SMALL))
        start = self._store(adapter(0, SMALL))
        updates = [
            Update(site=site, digest=self._store(adapter(seed, SMALL)).digest, examples=seed, norm=1.0)
            for seed, site in enumerate(SITES, 1)
        ]
        self.order = Aggregate(
            last=Version(adapter=start.digest, broadcast={"": start}),
            schema=self.blobs.take(folder / "schema")[0],
            tiers=dict.fromkeys(SITES, ""),
            updates=tuple(updates),
        )

    def _store(self, adapter: Tensors) -> Stored:
        tensors.save(self._folder / "file", adapter)
        digest, size = self.blobs.take(self._folder / "file")
        return Stored(digest=digest, size=size)

    def stamped(self) -> Aggregate:
        updates = (replace(update, stamp=self.blobs.stamp(update.digest)) for update in self.order.updates)
        return replace(self.order, updates=tuple(updates))

    def files(self) -> set[str]:
        return {str(path) for path in (self._folder / "blobs").rglob("*")}


@pytest.fixture
def round_(tmp_path: Path) -> Round:
    return Round(tmp_path)


@pytest.fixture
def readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write adapters to files, and open these."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", BLOCK_BYTES)
    with ExitStack() as files:

        def opened(name: str, adapter: Tensors) -> tensors.Reader:
            tensors.save(tmp_path / name, adapter)
            return files.enter_context(tensors.reading(tmp_path / name))

        yield opened


def test_what_is_read_in_pieces_is_averaged_bit_for_bit_as_whole_tensors_are(readers: Any) -> None:
    running = [Mean().begin(None, SCHEMA) for _ in range(4)]  # type: ignore[arg-type]  # nothing is kept of it
    whole, pieces, together, mixed = running
    origins = [replace(ORIGIN, weight=weight) for weight in (0.5, 0.3, 0.2)]
    held = [adapter(seed) for seed in range(3)]
    files = [readers(f"{seed}", one) for seed, one in enumerate(held)]
    for origin, one, file in zip(origins, held, files, strict=True):
        whole.add(one, origin)
        pieces.add(file, origin)
    together.add_together(list(zip(files[:2], origins[:2], strict=True)))
    together.add_together([(files[2], origins[2])])
    mixed.add_together(list(zip([files[0], held[1], files[2]], origins, strict=True)))
    first, *others = (one.finish([""]).adapter for one in running)
    assert first.keys() == SCHEMA.keys()
    for other in others:
        assert other.keys() == SCHEMA.keys() and all(torch.equal(first[key], other[key]) for key in SCHEMA)


def test_a_negative_zero_stays_one(readers: Any) -> None:
    running = Mean().begin(None, SMALL)  # type: ignore[arg-type]  # nothing is kept of it
    running.add(readers("zeros", {key: -torch.zeros_like(one) for key, one in adapter(0, SMALL).items()}), ORIGIN)
    assert torch.signbit(running.finish([""]).adapter["F32.1"])


def test_a_file_of_another_shape_or_with_another_index_is_refused(readers: Any) -> None:
    running = Mean().begin(None, SMALL)  # type: ignore[arg-type]  # nothing is kept of it
    running.add(readers("first", adapter(0, SMALL)), ORIGIN)
    with pytest.raises(InputError, match=r"F64.1 is \[1, 1\] at ward and \[1\] at others"):
        running.add(readers("shape", adapter(1, SMALL) | {"F64.1": torch.zeros(1, 1).double()}), ORIGIN)
    with pytest.raises(InputError, match="index is fixed, but another at ward"):
        running.add(readers("index", adapter(1, SMALL) | {"index": torch.ones(3, dtype=torch.int32)}), ORIGIN)


def test_whoever_was_first_the_version_is_the_same(round_: Round) -> None:
    late = replace(round_.order, updates=round_.order.updates[::-1])
    one, other = (aggregate(round_.node, SPEC, order) for order in (round_.order, late))
    assert (one.version, one.lineage) == (other.version, other.lineage)


def test_a_late_update_counts_as_its_change_on_top_of_the_newest_broadcast_at_less_weight(round_: Round) -> None:
    old, (bank, *others) = adapter(9, SMALL), round_.order.updates
    late = replace(bank, age=3, start=round_._store(old).digest)
    folded = aggregate(round_.node, SPEC, replace(round_.order, updates=(*others, late)))
    total = 1 * 0.5 + 2 + 3 + 4  # examples, those of the late one by (1 + 3) ** -0.5
    assert folded.late["bank"] == LatePart(update=bank.digest, weight=0.5 / total, age=3)
    assert [part.weight for part in folded.lineage.values()] == [2 / total, 3 / total, 4 / total]
    assert folded.sites == SITES
    made, new = tensors.load(round_.blobs.path(folded.version.adapter)), adapter(0, SMALL)
    for key in ("F64.1", "F32.1"):
        rebased = new[key] + adapter(1, SMALL)[key] - old[key]
        mean = (0.5 * rebased + sum(seed * adapter(seed, SMALL)[key] for seed in (2, 3, 4))) / total
        torch.testing.assert_close(made[key], mean, rtol=1e-5, atol=1e-6)


def test_both_updates_of_a_site_are_folded_where_one_is_late(round_: Round) -> None:
    late = replace(round_.order.updates[0], age=1, start=round_.order.last.broadcast[""].digest)
    folded = aggregate(round_.node, SPEC, replace(round_.order, updates=(*round_.order.updates, late)))
    assert [*folded.lineage] == [*SITES] and [*folded.late] == ["bank"]
    assert folded.late["bank"].weight == pytest.approx(folded.lineage["bank"].weight * 2**-0.5)


def test_a_late_update_that_is_far_larger_than_the_others_is_left_out_and_named(round_: Round) -> None:
    late = replace(round_.order.updates[0], age=1, start=round_.order.last.adapter, norm=9.0)
    folded = aggregate(round_.node, SPEC, replace(round_.order, updates=(*round_.order.updates, late)))
    assert folded.left_out["bank"].startswith("bank, 1 rounds late: its update changed by a norm of 9")


@pytest.mark.parametrize("place", [0, len(SITES) - 1])
def test_nothing_is_stored_of_a_fold_with_an_update_that_has_changed_on_the_disk(round_: Round, place: int) -> None:
    path = round_.blobs.path(round_.order.updates[place].digest)
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # of a finite value
    before = round_.files()
    with pytest.raises(MismatchError, match="the file has changed since it was stored"):
        aggregate(round_.node, SPEC, round_.order)
    assert round_.files() == before


def test_the_next_files_are_checked_while_one_is_folded_and_no_others() -> None:
    done, second = list[int](), threading.Event()

    def do(item: int) -> int:
        done.append(item)
        if item == AHEAD + 1:
            second.set()
        if item == AHEAD + 3:
            raise MismatchError("the last")
        return -item

    with ThreadPoolExecutor(1) as threads:
        one = iter(Ahead(threads, do, range(1, AHEAD + 4)))
        assert next(one) == -1
        assert second.wait(60), "it is done before anybody asks for it"
        assert done == [*range(1, AHEAD + 2)]
        assert [next(one) for _ in range(AHEAD + 1)] == [-item for item in range(2, AHEAD + 3)]
        with pytest.raises(MismatchError, match="the last"):
            next(one)
        assert [*Ahead(threads, do, [0])] == [0] and not [*Ahead(threads, do, [])]


def test_each_who_asks_gets_all_files_and_the_error_of_one_that_has_changed() -> None:
    def do(item: int) -> int:
        done.append(item)
        if item == AHEAD + 2:
            raise MismatchError("it has changed")
        return -item

    done = list[int]()
    with ThreadPoolExecutor(2) as threads:
        files = Ahead(threads, do, range(AHEAD + 3))
        first, second = iter(files), iter(files)
        assert [next(first) for _ in range(AHEAD + 2)] == [next(second) for _ in range(AHEAD + 2)]
        for one in (first, second):
            with pytest.raises(MismatchError, match="it has changed"):
                next(one)
    assert sorted(done) == [*range(AHEAD + 3)], "each is done once"


def test_an_update_is_not_checked_again_if_its_file_is_as_it_was_when_it_was_stamped(
    round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, digest_file = list[str](), blobs.digest_file

    def noted(path: Path, **like: Any) -> str:
        checked.append(digest_file(path, **like))
        return checked[-1]

    whole = aggregate(round_.node, SPEC, round_.order)
    order = round_.stamped()
    monkeypatch.setattr(blobs, "digest_file", noted)
    one, path = aggregate(round_.node, SPEC, order), round_.blobs.path(order.updates[0].digest)
    assert (one.version, one.lineage) == (whole.version, whole.lineage)
    assert not {update.digest for update in order.updates[1:]} & {*checked}
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(MismatchError, match="the file has changed since it was stored"):
        aggregate(round_.node, SPEC, order)


@pytest.mark.parametrize("threads", [2, 3])
def test_a_fold_by_several_threads_is_a_fold(round_: Round, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    whole = aggregate(round_.node, SPEC, round_.order)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for order in (round_.order, round_.stamped()):
        assert replace(aggregate(round_.node, SPEC, order), spans=()) == replace(whole, spans=())
    path = round_.blobs.path(round_.order.updates[-1].digest)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(MismatchError, match="the file has changed since it was stored"):
        aggregate(round_.node, SPEC, round_.order)


def test_a_broadcast_that_is_the_adapter_is_written_once(round_: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save = list[Path](), tensors.save

    def counted(path: Path, *rest: Any, **more: Any) -> None:
        written.append(path)
        save(path, *rest, **more)

    monkeypatch.setattr(tensors, "save", counted)
    version = aggregate(round_.node, SPEC, round_.order).version
    assert len(written) == 1 and version.broadcast[""].digest == version.adapter
    assert os.path.getsize(round_.blobs.path(version.adapter)) == version.broadcast[""].size
    assert storage.load_version(round_.blobs, version).broadcast[""].keys() == SMALL.keys()


def test_given_weights_fold_as_the_runs_own_do_and_name_who_is_there(round_: Round) -> None:
    own = aggregate(round_.node, SPEC, round_.order)
    weights = {site: part.weight for site, part in own.lineage.items()}
    assert aggregate(round_.node, SPEC, replace(round_.order, weights=weights)).version == own.version
    *rest, _ = round_.order.updates
    least = replace(SPEC, min_sites=len(SITES))  # of the run; a round without one of its sites is no round of it
    others = replace(round_.order, updates=tuple(rest), weights={one.site: 1 / 3 for one in rest})
    assert aggregate(round_.node, least, others).version != own.version


def test_who_is_like_the_mean_is_told_by_the_files(round_: Round) -> None:
    weights = {site: part.weight for site, part in aggregate(round_.node, SPEC, round_.order).lineage.items()}
    order = replace(round_.order, weights=weights, updates=round_.order.updates[::-1])
    cosines = compare(round_.node, SPEC, Compare(folded=order)).cosines
    assert cosines.keys() == {*SITES} and max(cosines, key=lambda site: cosines[site]) == "town"  # which weighs most
    assert all(0 < cosine < 1 for cosine in cosines.values())
