"""Voting on bits: most of the weight decides, ties keep what was, and the order of the sites changes nothing."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.folding import part_of
from offsite.coordinator.aggregation.vote import Vote
from offsite.kernels.bits import pack, unpack
from offsite.kernels.schema import Field, Rule, Schema, Tensors

BITS = {"0.q.mask": 21, "5.up.mask": 16}
SCHEMA: Schema = {
    **{key: Field("U8", (-(-bits // 8),), Rule.VOTE, key, bits=bits) for key, bits in BITS.items()},
    "0.q.norm": Field("F32", (2,), Rule.MEAN, "0.q.mask"),
    "0.q.size": Field("I32", (2,), Rule.FIXED, "0.q.mask", below=8),
}
WEIGHTS = [0.5, 0.3, 0.2]


def update(seed: int) -> Tensors:
    draw, made = torch.Generator().manual_seed(seed), Tensors()
    for key, bits in BITS.items():
        made[key] = pack(torch.rand(bits, generator=draw) < 0.5)
    return made | {"0.q.norm": torch.randn(2, generator=draw), "0.q.size": torch.tensor([3, 7], dtype=torch.int32)}


FIRST = Version(update(9), {"": update(9)})
UPDATES = [update(seed) for seed in range(3)]


def fold(updates: list[Tensors], weights: list[float], schema: Schema = SCHEMA, last: Version = FIRST) -> Version:
    running = Vote().begin(last, schema)
    for number, (one, weight) in enumerate(zip(updates, weights, strict=True)):
        running.add(one, Origin(f"site-{number}", "", weight))
    return running.finish([""])


def bits(given: Tensors) -> Tensor:
    return torch.cat([unpack(given[key], count) for key, count in BITS.items()]).bool()


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_bit_is_what_most_sites_have_it_to_be() -> None:
    version = fold(UPDATES, [1 / 3] * 3)
    majority = torch.stack([bits(one) for one in UPDATES]).sum(0) >= 2
    assert torch.equal(bits(version.adapter), majority) and equal(version.adapter, version.broadcast[""])
    agreed = torch.stack([bits(one) == majority for one in UPDATES]).double().mean()
    zeros = float((~majority).double().mean())
    assert version.figures == {"zeros": zeros, "agreement": pytest.approx(float(agreed))}


def test_weight_counts_and_not_the_number_of_sites() -> None:
    assert torch.equal(bits(fold(UPDATES, [0.6, 0.3, 0.1]).adapter), bits(UPDATES[0]))


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [0.5, 1 / 3, 1 / 6], [0.5, 0.1 + 0.2, 0.2]])
def test_a_tie_leaves_a_bit_as_it_was_whatever_weights_round_to(weights: list[float]) -> None:
    one, other = bits(UPDATES[0]), bits(UPDATES[1])
    version = fold([UPDATES[0], UPDATES[1], UPDATES[1]], weights)
    assert torch.equal(bits(version.adapter), torch.where(one == other, one, bits(FIRST.adapter)))


def test_a_round_in_which_nobody_changes_anything_is_the_same_version() -> None:
    for sites in range(1, 8):
        version = fold([FIRST.broadcast[""]] * sites, [1 / sites] * sites)
        assert torch.equal(bits(version.adapter), bits(FIRST.adapter)) and version.figures["agreement"] == 1


def test_the_order_of_arrival_changes_no_bit_and_no_figure() -> None:
    updates, weights = [update(seed) for seed in range(4)], [0.1, 0.2, 0.3, 0.4]
    for order in permutations(range(4)):
        version = fold([updates[at] for at in order], [weights[at] for at in order])
        expected = fold(updates, weights)
        assert torch.equal(bits(version.adapter), bits(expected.adapter)) and version.figures == expected.figures


def test_bits_beyond_a_tensor_s_stay_zero_and_what_is_no_bit_is_averaged() -> None:
    version = fold(UPDATES, WEIGHTS)
    assert int(version.adapter["0.q.mask"][-1]) >> 21 % 8 == 0
    mean = sum(w * one["0.q.norm"] for one, w in zip(UPDATES, WEIGHTS, strict=True))
    torch.testing.assert_close(version.adapter["0.q.norm"], mean)
    assert torch.equal(version.adapter["0.q.size"], UPDATES[0]["0.q.size"])


def test_parts_that_are_folded_apart_join_to_the_same_version() -> None:
    parts = [fold(UPDATES, WEIGHTS, part_of(SCHEMA, part, 3)) for part in (2, 1, 0)]
    joined, whole = Vote().join(parts), fold(UPDATES, WEIGHTS)
    assert equal(joined.adapter, whole.adapter) and equal(joined.broadcast[""], whole.broadcast[""])
    assert joined.figures == whole.figures
