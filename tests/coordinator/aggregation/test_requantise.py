"""Averaging what codes stand for: the values and not the bits, nothing lost, and no change where nobody changes."""

import pytest
import torch
from torch import Tensor

from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.folding import part_of
from offsite.coordinator.aggregation.requantise import Requantise
from offsite.kernels.bits import pack
from offsite.kernels.coded import decode, encode, read
from offsite.kernels.schema import Field, Rule, Schema, Tensors

COUNTS, WIDTHS = {"0.q.A": 50, "5.up.B": 33}, {"0.q.A": 1, "5.up.B": 2}
SCHEMA: Schema = {
    key: field
    for name, count in COUNTS.items()
    for key, field in {
        f"{name}.codes": Field(
            "U8",
            (-(-count * WIDTHS[name] // 8),),
            Rule.REQUANTISE,
            name,
            bits=count * WIDTHS[name],
            width=WIDTHS[name],
        ),
        f"{name}.line": Field("F32", (2,), Rule.REQUANTISE, name),
        f"{name}.norm": Field("F32", (2,), Rule.MEAN, f"{name}.norm"),
    }.items()
}
WEIGHTS = [0.5, 0.3, 0.2]


def update(seed: int, *, spread: float = 1.0) -> Tensors:
    draw, made = torch.Generator().manual_seed(seed), Tensors()
    for name, count in COUNTS.items():
        coded = encode(spread * torch.randn(count, generator=draw), WIDTHS[name])
        made |= {f"{name}.codes": pack(coded.codes, WIDTHS[name]), f"{name}.line": torch.tensor(coded[1:])}
        made[f"{name}.norm"] = torch.randn(2, generator=draw)
    return made


FIRST = Version(update(9), {"": update(9)})
UPDATES = [update(seed) for seed in range(3)]


def fold(last: Version, updates: list[Tensors], weights: list[float], schema: Schema = SCHEMA) -> Version:
    running = Requantise().begin(last, schema)
    for number, (one, weight) in enumerate(zip(updates, weights, strict=True)):
        running.add(one, Origin(f"site-{number}", "", weight))
    return running.finish([""])


def values(given: Tensors) -> Tensor:
    """What all codes stand for, one tensor after the other."""
    parts = [
        decode(read(given[f"{name}.codes"], given[f"{name}.line"], count, WIDTHS[name]), WIDTHS[name])
        for name, count in COUNTS.items()
    ]
    return torch.cat(parts)


def latent(version: Version) -> Tensor:
    return torch.cat([version.state["latent"][f"{name}.codes"] for name in COUNTS])


def mean(updates: list[Tensors], weights: list[float]) -> Tensor:
    return torch.stack([w * values(one) for one, w in zip(updates, weights, strict=True)]).sum(0)


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_what_codes_stand_for_is_averaged_and_never_the_bits() -> None:
    version = fold(FIRST, UPDATES, WEIGHTS)
    torch.testing.assert_close(latent(version), mean(UPDATES, WEIGHTS), rtol=1e-12, atol=1e-12)
    rest = latent(version) - values(version.adapter)
    assert version.figures == {"residual": pytest.approx(float(rest.norm() / latent(version).norm()))}
    assert 0 < version.figures["residual"] < 1 and equal(version.adapter, version.broadcast[""])


def test_sites_of_other_lines_are_no_vote_on_codes() -> None:
    large, small = update(1, spread=10.0), update(2, spread=0.1)
    version = fold(FIRST, [large, small, small], [1 / 3] * 3)
    for name in COUNTS:
        assert torch.equal(version.adapter[f"{name}.codes"], large[f"{name}.codes"])
        assert not torch.equal(small[f"{name}.codes"], large[f"{name}.codes"])


def test_what_codes_cannot_hold_is_added_to_what_sites_make_of_it_later() -> None:
    first = fold(FIRST, UPDATES, WEIGHTS)
    later = [update(seed) for seed in (4, 5)]
    version = fold(first, later, [0.75, 0.25])
    left = latent(first) - values(first.adapter)
    torch.testing.assert_close(latent(version), mean(later, [0.75, 0.25]) + left, rtol=1e-12, atol=1e-12)


def test_rounds_in_which_nobody_changes_anything_are_one_version_bit_for_bit() -> None:
    for first in (FIRST, fold(FIRST, UPDATES, WEIGHTS)):
        version = first
        for sites in range(1, 5):
            version = fold(version, [version.broadcast[""]] * sites, [1 / sites] * sites)
            for name in COUNTS:
                for part in ("codes", "line"):
                    assert torch.equal(version.adapter[f"{name}.{part}"], first.adapter[f"{name}.{part}"])
            assert torch.equal(latent(version), latent(first) if first.state else values(FIRST.adapter))


def test_one_site_is_passed_through_bit_for_bit_where_nothing_was_left_over() -> None:
    only = update(1)
    close = {key: tensor for key, tensor in only.items() if key.endswith(("codes", "line"))}
    version = fold(Version(only, {"": only}), [only], [1.0])
    assert all(torch.equal(version.adapter[key], tensor) for key, tensor in close.items())


def test_changes_too_small_for_a_code_add_up_over_rounds() -> None:
    version, wanted = FIRST, values(FIRST.adapter).clone()
    target = values(update(3))
    for _ in range(40):
        sent = fold(version, [update(3), version.broadcast[""]], [0.1, 0.9])
        wanted += 0.1 * (target - values(version.adapter))
        version = sent
    torch.testing.assert_close(latent(version), wanted, rtol=1e-9, atol=1e-9)
    assert float((values(version.adapter) - target).norm()) < 0.1 * float((values(FIRST.adapter) - target).norm())


def test_parts_that_are_folded_apart_join_to_the_same_version() -> None:
    first = fold(FIRST, UPDATES, WEIGHTS)
    parts = [fold(first, UPDATES, WEIGHTS, part_of(SCHEMA, part, 3)) for part in (2, 0, 1)]
    joined, whole = Requantise().join(parts), fold(first, UPDATES, WEIGHTS)
    assert equal(joined.adapter, whole.adapter) and equal(joined.state["latent"], whole.state["latent"])
    assert joined.figures == whole.figures
