"""Shards handed out by what each site can carry."""

from itertools import pairwise
from typing import Any

import pytest

from offsite.emulator import parts
from offsite.emulator.parts import Turn
from offsite.kernels.schema import Field, Rule, Schema, groups
from offsite.protos.recipes import parse_one

LAYERS = (0, 1, 9, 10)
SCHEMA: Schema = {
    **{f"{layer}.{name}.weight": Field("F32", (4, 4), Rule.MEAN) for layer in LAYERS for name in "qkvo"},
    "0.index": Field("I32", (2,), Rule.FIXED, below=3),
}
EVERY = frozenset(groups(SCHEMA)) - {"0.index"}
FLEET = {"clinic": 1, "phone": 2, "ward": 1}


def part(**settings: Any) -> Any:
    return parts.make("by-capability", settings)


def trains(one: Any, number: int, site: str, schema: Schema = SCHEMA) -> frozenset[str]:
    named: frozenset[str] = one.groups(schema, Turn(3, number, site))
    return named


def test_a_shard_is_whole_layers_where_these_are_alike_and_a_site_trains_as_many_as_it_carries() -> None:
    for carries in range(1, 5):
        one = part(carries=carries)
        assert trains(one, 0, "ward") == {f"{layer}.{name}.weight" for layer in LAYERS[:carries] for name in "qkvo"}


@pytest.mark.parametrize(("shards", "carries", "rounds"), [(4, 1, 4), (4, 2, 2), (5, 2, 3), (8, 3, 3), (4, 4, 1)])
def test_each_shard_has_its_turn_at_a_site_alone(shards: int, carries: int, rounds: int) -> None:
    own = [trains(part(shards=shards, carries=carries), number, "ward") for number in range(rounds)]
    assert frozenset().union(*own) == EVERY != frozenset().union(*own[:-1])
    assert trains(part(shards=shards, carries=carries), shards, "ward") == own[0], "and begins anew"


@pytest.mark.parametrize("number", range(6))
def test_sites_that_carry_the_adapter_together_train_each_shard_once_in_any_round(number: int) -> None:
    own = {site: trains(part(sites=FLEET), number, site) for site in FLEET}
    assert sum(map(len, own.values())) == len(EVERY) and frozenset().union(*own.values()) == EVERY
    assert {site: len(one) for site, one in own.items()} == {"clinic": 4, "phone": 8, "ward": 4}


def test_all_sites_have_trained_all_shards_by_the_time_that_the_least_has() -> None:
    one = part(shards=5, carries=5, sites={"a": 2, "b": 3})
    for site in ("a", "b", "c"):
        assert frozenset().union(*(trains(one, number, site) for number in range(3))) == EVERY
    assert not any(trains(one, number, "a") & trains(one, number, "b") for number in range(10))


def test_sites_that_are_not_named_train_alike_and_all_of_it_if_they_can_carry_that() -> None:
    assert part().alike and not part(sites=FLEET).alike
    assert trains(part(), 1, "a") == trains(part(), 1, "b") != trains(part(), 2, "a")
    assert trains(part(carries=4, sites={"phone": 1}), 7, "a") == EVERY


@pytest.mark.parametrize("site", [*FLEET, "stranger"])
def test_a_site_is_told_its_own_share_alone_and_trains_the_same_by_that(site: str) -> None:
    one = part(shards=3, sites=FLEET)
    told = one.settings_at(site)
    assert not {"sites"} & told.keys()
    for number in range(5):
        assert trains(part(**told), number, site) == trains(one, number, site)


def test_shards_have_about_as_many_values_each_and_none_is_empty() -> None:
    sizes = (90, 1, 1, 1, 30, 30, 30, 1, 1)
    uneven = {f"{at}.w.b": Field("F32", (size,), Rule.MEAN) for at, size in enumerate(sizes)}
    cut = [sorted(trains(part(shards=9 - more), at, "x", uneven)) for more in (0, 5) for at in range(9 - more)]
    assert cut[:9] == [[f"{at}.w.b"] for at in range(9)]
    assert cut[9:] == [[f"{at}.w.b" for at in run] for run in ([0], [1, 2, 3, 4], [5, 6], [7, 8])]


def test_the_tensors_of_a_map_train_together_unless_its_method_makes_groups_of_them() -> None:
    plain: Schema = {f"0.{name}.{side}": Field("F32", (4, 4), Rule.MEAN) for name in "qk" for side in ("down", "up")}
    assert [trains(part(shards=2), number, "x", plain) for number in (0, 1)] == [
        {f"0.{name}.down", f"0.{name}.up"} for name in "kq"
    ]
    pools: Schema = {
        f"0.q.{pool}_{at}": Field("F32", (4, 4), Rule.MEAN, f"0.q.{at}") for pool in "AB" for at in range(3)
    }
    assert [trains(part(shards=3), number, "x", pools) for number in range(3)] == [{f"0.q.{at}"} for at in range(3)]


def test_what_all_experts_of_a_map_have_in_common_trains_with_them() -> None:
    mosa: Schema = {f"0.{name}.down": Field("F32", (4, 4), Rule.MEAN) for name in "qk"}
    mosa |= {f"0.{name}.up_{at}": Field("F32", (8,), Rule.MEAN, f"0.{name}.{at}") for name in "qk" for at in range(2)}
    assert [trains(part(shards=2), number, "x", mosa) for number in (0, 1)] == [
        {f"0.{name}.{end}" for end in ("0", "1", "down")} for name in "kq"
    ]


def test_sites_of_all_ranks_have_the_same_shards() -> None:
    maps = {"0.q": (4, 4), "0.up": (12, 4), "1.q": (4, 4), "1.up": (12, 4)}

    def lora(rank: int | None) -> Schema:
        sides = {f"{name}.A": Field("F32", (rank, d), Rule.PRODUCT, name) for name, (_, d) in maps.items()}
        return sides | {f"{name}.B": Field("F32", (d, rank), Rule.PRODUCT, name) for name, (d, _) in maps.items()}

    cuts = [[trains(part(shards=2), number, "x", lora(rank)) for number in (0, 1)] for rank in (None, 8)]
    assert cuts[0] == cuts[1] == [{"0.q", "0.up"}, {"1.q", "1.up"}]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shards": 1}, "shards must be at least 2, got 1"),
        ({"first": 4}, "first must be one of the shards 0..3, got 4"),
        ({"carries": 5}, "carries must be in 1..4, the number of shards, got 5"),
        ({"carries": 2, "step": 3}, "step must be in 0..2, what the least site carries, or some shards would"),
        ({"sites": {"phone": 0}}, "sites: 'phone' must be in 1..4, the number of shards, got 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        part(**settings)


def test_what_leaves_nothing_out_or_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves nothing out, for all sites carry all 4 shards; use part all"):
        part(carries=4).fits(SCHEMA)
    part(carries=4, sites={"phone": 3}).fits(SCHEMA)
    one = part(shards=17)
    for refuse in (lambda: one.fits(SCHEMA), lambda: trains(one, 0, "x")):
        with pytest.raises(ValueError, match="cuts an adapter into 17 shards, and this one has 16 maps or groups of t"):
            refuse()


def test_a_recipe_says_it() -> None:
    choice = parse_one('by-capability(shards=8,carries=8,sites={"phone":1})')
    one = parts.make(choice.name, choice.settings)
    counts = [len(trains(one, number, "phone")) for number in range(8)]
    assert counts == [2] * 8 and all(a != b for a, b in pairwise(trains(one, n, "phone") for n in range(8)))
