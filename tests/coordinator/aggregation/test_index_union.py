"""Averaging sparse matrices of unequal indices: exact, a fixed point, and the same whoever was first."""

from itertools import permutations

import pytest
import torch

from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.folding import part_of
from offsite.coordinator.aggregation.index_union import IndexUnion
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos.errors import InputError

SIZE, COUNT = 40, 7
MAPS = ("0.q", "5.up")
SCHEMA: Schema = {
    key: field
    for name in MAPS
    for key, field in {
        f"{name}.at": Field("I32", (None,), Rule.UNION, name, below=SIZE),
        f"{name}.values": Field("F32", (None,), Rule.UNION, name),
        f"{name}.size": Field("I32", (2,), Rule.FIXED, name, below=9),
    }.items()
}
WEIGHTS = [0.5, 0.3, 0.2]


def update(seed: int, *, count: int = COUNT) -> Tensors:
    draw, made = torch.Generator().manual_seed(seed), Tensors()
    for name in MAPS:
        made[f"{name}.at"] = torch.randperm(SIZE, generator=draw)[:count].sort().values.int()
        made[f"{name}.values"] = torch.randn(count, generator=draw)
        made[f"{name}.size"] = torch.tensor([5, 8], dtype=torch.int32)
    return made


UPDATES = [update(seed) for seed in range(3)]
FIRST = Version(update(9), {"": update(9)})


def fold(last: Version, updates: list[Tensors], weights: list[float], schema: Schema = SCHEMA) -> Version:
    running = IndexUnion().begin(last, schema)
    for number, (one, weight) in enumerate(zip(updates, weights, strict=True)):
        running.add(one, Origin(f"site-{number}", "", weight))
    return running.finish([""])


def dense(given: Tensors) -> torch.Tensor:
    """The matrices of all maps, one after the other."""
    return torch.cat(
        [torch.zeros(SIZE).double().index_add(0, given[f"{m}.at"], given[f"{m}.values"].double()) for m in MAPS]
    )


def mean(updates: list[Tensors], weights: list[float]) -> torch.Tensor:
    return sum((w * dense(one) for one, w in zip(updates, weights, strict=True)), torch.zeros(2 * SIZE).double())


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_the_adapter_is_the_weighted_mean_of_the_sparse_matrices() -> None:
    version = fold(FIRST, UPDATES, WEIGHTS)
    torch.testing.assert_close(dense(version.adapter), mean(UPDATES, WEIGHTS), rtol=1e-6, atol=1e-7)
    assert all(len(version.adapter[f"{m}.at"]) > COUNT for m in MAPS)


def test_the_broadcast_has_as_many_entries_as_before_the_largest_and_the_rest_stays() -> None:
    version = fold(FIRST, UPDATES, WEIGHTS)
    sent, rest = version.broadcast[""], version.state["residual"]
    assert torch.equal(dense(sent) + dense(rest), dense(version.adapter))
    for name in MAPS:
        assert len(sent[f"{name}.at"]) == COUNT and bool((sent[f"{name}.at"].diff() > 0).all())
        assert not set(sent[f"{name}.at"].tolist()) & set(rest[f"{name}.at"].tolist())
        assert sent[f"{name}.values"].abs().min() >= rest[f"{name}.values"].abs().max()
    share = float(dense(rest).norm() / dense(version.adapter).norm())
    assert version.figures == {"residual": pytest.approx(share)} and share > 0.1


def test_one_site_is_passed_through_bit_for_bit_with_entries_that_are_zero() -> None:
    only = update(1)
    only["0.q.values"][2:5] = 0.0
    version = fold(FIRST, [only], [1.0])
    assert equal(version.adapter, only) and equal(version.broadcast[""], only)
    assert all(not len(tensor) for tensor in version.state["residual"].values())


def test_ten_rounds_in_which_nobody_changes_anything_are_one_version_bit_for_bit() -> None:
    first = version = fold(FIRST, UPDATES, WEIGHTS)
    for sites in range(1, 11):
        version = fold(version, [version.broadcast[""]] * sites, [1 / sites] * sites)
        assert equal(version.adapter, first.adapter) and equal(version.broadcast[""], first.broadcast[""])
        assert equal(version.state["residual"], first.state["residual"]) and version.figures == first.figures


def test_what_stayed_with_the_owner_is_added_to_what_sites_make_of_it_later() -> None:
    first = fold(FIRST, UPDATES, WEIGHTS)
    later = [update(seed) for seed in (4, 5)]
    version = fold(first, later, [0.75, 0.25])
    expected = mean(later, [0.75, 0.25]) + dense(first.state["residual"])
    torch.testing.assert_close(dense(version.adapter), expected, rtol=1e-6, atol=1e-7)


def test_the_order_of_arrival_changes_no_bit() -> None:
    first, weights = fold(FIRST, UPDATES, WEIGHTS), [0.2, 0.2, 0.31, 0.29]
    updates = [update(seed) for seed in range(4)]
    for one, factor in zip(updates, (1e12, -1e12), strict=False):  # they cancel, but in plain sums take digits along
        one |= {"0.q.at": updates[2]["0.q.at"], "0.q.values": factor * updates[0]["0.q.values"].sign()}
    versions = [
        fold(first, [updates[at] for at in order], [weights[at] for at in order]) for order in permutations(range(4))
    ]
    for version in versions:
        assert equal(version.adapter, versions[0].adapter) and equal(version.broadcast[""], versions[0].broadcast[""])
        assert equal(version.state["residual"], versions[0].state["residual"])


def test_parts_that_are_folded_apart_join_to_the_same_version() -> None:
    first = fold(FIRST, UPDATES, WEIGHTS)
    parts = [fold(first, UPDATES, WEIGHTS, part_of(SCHEMA, part, 2)) for part in (1, 0)]
    joined, whole = IndexUnion().join(parts), fold(first, UPDATES, WEIGHTS)
    assert equal(joined.adapter, whole.adapter) and equal(joined.broadcast[""], whole.broadcast[""])
    assert equal(joined.state["residual"], whole.state["residual"]) and joined.figures == whole.figures


def test_memory_is_bounded_by_the_matrix_not_by_the_number_of_sites() -> None:
    version = fold(FIRST, [update(seed) for seed in range(200)], [1 / 200] * 200)
    assert all(len(version.adapter[f"{m}.at"]) == SIZE for m in MAPS)


def test_sites_that_train_more_entries_than_others_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="0.q.at has 8 entries at site-1 and 7 at others"):
        fold(FIRST, [update(0), update(1, count=8)], [0.5, 0.5])
