"""Folds of updates that lack groups: each group over those who trained it, and what nobody trained as it was."""

import itertools
from collections.abc import Collection
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.folding import fold
from offsite.coordinator.aggregation.keyed import Share
from offsite.kernels.schema import Field, Rule, Schema, Tensors, groups
from offsite.protos.errors import InputError

LAYERS = range(4)
SCHEMA: Schema = {
    **{f"{at}.q.A": Field("F32", (None, 10), Rule.PRODUCT, f"{at}.q") for at in LAYERS},
    **{f"{at}.q.B": Field("F32", (8, None), Rule.PRODUCT, f"{at}.q") for at in LAYERS},
    **{f"{at}.norm": Field("F32", (5,), Rule.MEAN) for at in LAYERS},
    **{f"{at}.s.at": Field("I32", (None,), Rule.UNION, f"{at}.s", below=30) for at in LAYERS},
    **{f"{at}.s.values": Field("F32", (None,), Rule.UNION, f"{at}.s") for at in LAYERS},
}
STRATEGIES = sorted(
    name for name, kind in aggregation.STRATEGIES.items() if any(field.rule in kind.rules for field in SCHEMA.values())
)
WEIGHTS = {"bank": 0.5, "clinic": 0.3, "ward": 0.2}


def schema(name: str) -> Schema:
    """What of the schema a strategy folds."""
    return {key: field for key, field in SCHEMA.items() if field.rule in aggregation.STRATEGIES[name].rules}


def adapter(seed: int, name: str) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for at in LAYERS:
        made |= {f"{at}.q.A": torch.randn(3, 10, generator=draw), f"{at}.q.B": torch.randn(8, 3, generator=draw)}
        made |= {f"{at}.norm": torch.randn(5, generator=draw), f"{at}.s.values": torch.randn(6, generator=draw)}
        made[f"{at}.s.at"] = torch.randperm(30, generator=draw)[:6].sort().values.int()
    return {key: made[key] for key in schema(name)}


def begun(name: str) -> Version:
    """A version with something that only its owner keeps: the fold of three adapters."""
    first = adapter(9, name)
    shares = {site: Share(weight, groups(schema(name))) for site, weight in WEIGHTS.items()}
    return folded(
        name, {site: adapter(seed, name) for seed, site in enumerate(WEIGHTS, 10)}, shares, Version(first, {"": first})
    )


def folded(name: str, updates: dict[str, Tensors], shares: dict[str, Share], last: Version) -> Version:
    given = [
        (Origin(site, "", share.weight), nullcontext({key: updates[site][key] for key in keys_of(name, share.groups)}))
        for site, share in sorted(shares.items())
    ]
    return fold(aggregation.make(name, {}), last, schema(name), given, tiers=[""], shares=shares)


def keys_of(name: str, names: Collection[str]) -> list[str]:
    return [key for group, keys in groups(schema(name)).items() if group in names for key in keys]


def layers(name: str, *of: int) -> list[str]:
    return [group for group in groups(schema(name)) if int(group.partition(".")[0]) in of]


def same(one: Tensors, other: Tensors, keys: Collection[str]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in keys)


@pytest.mark.parametrize("name", STRATEGIES)
def test_sites_with_layers_of_their_own_give_the_union_of_them_bit_for_bit(name: str) -> None:
    last, updates = begun(name), {site: adapter(seed, name) for seed, site in enumerate(WEIGHTS)}
    own = {site: layers(name, at) for at, site in enumerate(WEIGHTS)}
    version = folded(name, updates, {site: Share(weight, own[site]) for site, weight in WEIGHTS.items()}, last)
    assert version.adapter.keys() == version.broadcast[""].keys() == schema(name).keys()
    for site, names in own.items():
        (alone,) = [folded(name, updates, {site: Share(1.0, groups(schema(name)))}, last)]
        for mine, its in ((version.adapter, alone.adapter), (version.broadcast[""], alone.broadcast[""])):
            assert same(mine, its, keys_of(name, names)), "as if it were the only one, at full weight"


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_nobody_trained_keeps_its_bytes_and_what_its_owner_keeps_of_it(name: str) -> None:
    last, updates = begun(name), {site: adapter(seed, name) for seed, site in enumerate(WEIGHTS)}
    version = folded(name, updates, {site: Share(weight, layers(name, 1, 2)) for site, weight in WEIGHTS.items()}, last)
    untouched = keys_of(name, layers(name, 0, 3))
    assert same(version.adapter, last.adapter, untouched) and same(version.broadcast[""], last.broadcast[""], untouched)
    assert version.state.keys() == last.state.keys() == ({"low-rank", "index-union"} & {name} and {*last.state})
    for kept, tensors in last.state.items():
        assert same(version.state[kept], tensors, tensors.keys() & {*untouched})
    assert not same(version.adapter, last.adapter, keys_of(name, layers(name, 1, 2)))


@pytest.mark.parametrize("name", ["mean", "low-rank"])
def test_a_layer_is_averaged_over_the_weight_of_those_who_trained_it(name: str) -> None:
    last, updates = begun(name), {site: adapter(seed, name) for seed, site in enumerate(WEIGHTS)}
    has = {"bank": layers(name, 0, 1), "clinic": layers(name, 1, 2), "ward": layers(name, 1, 2)}
    version = folded(name, updates, {site: Share(weight, has[site]) for site, weight in WEIGHTS.items()}, last)
    for at, sites in ((0, ["bank"]), (1, [*WEIGHTS]), (2, ["clinic", "ward"])):
        total = sum(WEIGHTS[site] for site in sites)
        wanted = sum(WEIGHTS[site] / total * updates[site][f"{at}.norm"] for site in sites)
        torch.testing.assert_close(version.adapter[f"{at}.norm"], wanted)
    if name == "low-rank":
        sites = ["clinic", "ward"]
        products = [updates[site]["2.q.B"].double() @ updates[site]["2.q.A"].double() for site in sites]
        rest = last.state["residual."]["2.q.B"].double() @ last.state["residual."]["2.q.A"].double()
        mean = 0.6 * products[0] + 0.4 * products[1] + rest
        torch.testing.assert_close(
            version.adapter["2.q.B"].double() @ version.adapter["2.q.A"].double(), mean, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", STRATEGIES)
def test_complete_updates_are_folded_as_ever_bit_for_bit(name: str) -> None:
    last, updates = begun(name), {site: adapter(seed, name) for seed, site in enumerate(WEIGHTS)}
    shares = {site: Share(weight, groups(schema(name))) for site, weight in WEIGHTS.items()}
    given = [(Origin(site, "", weight), nullcontext(updates[site])) for site, weight in WEIGHTS.items()]
    plain = fold(aggregation.make(name, {}), last, schema(name), given, tiers=[""])
    keyed = folded(name, updates, shares, last)
    assert same(plain.adapter, keyed.adapter, schema(name)) and plain.figures == keyed.figures


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_round_that_changes_nothing_gives_the_same_version(name: str) -> None:
    last = begun(name)
    sent = last.broadcast[""]
    has = {"bank": layers(name, 0, 1), "clinic": layers(name, 1, 2), "ward": layers(name, 2)}
    once = folded(name, dict.fromkeys(WEIGHTS, sent), {site: Share(WEIGHTS[site], has[site]) for site in WEIGHTS}, last)
    for key in schema(name):
        if not key.endswith((".A", ".B")) and key in last.adapter:
            torch.testing.assert_close(once.adapter[key], last.adapter[key], rtol=1e-6, atol=1e-7)
    if name == "low-rank":
        for at in LAYERS:
            mine, its = (version.adapter[f"{at}.q.B"] @ version.adapter[f"{at}.q.A"] for version in (once, last))
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_groups_in_several_parts_give_the_same_bytes(name: str) -> None:
    """As workers fold them, each some groups of all updates."""
    last, strategy = begun(name), aggregation.make(name, {})
    has = {"bank": layers(name, 0, 1), "clinic": layers(name, 1, 2), "ward": layers(name, 2)}
    shares = {site: Share(WEIGHTS[site], has[site]) for site in WEIGHTS}
    updates = {site: adapter(seed, name) for seed, site in enumerate(WEIGHTS)}
    whole = folded(name, updates, shares, last)
    parts = []
    for at in LAYERS:  # of the last nobody trained any
        some = {key: field for key, field in schema(name).items() if key.startswith(f"{at}.")}
        given = [(Origin(site, "", WEIGHTS[site]), nullcontext(updates[site])) for site in WEIGHTS]
        parts.append(fold(strategy, last, some, given, tiers=[""], shares=shares))
    joined = strategy.join(parts)  # type: ignore[attr-defined]
    assert same(whole.adapter, joined.adapter, schema(name)) and whole.figures == pytest.approx(joined.figures)


def test_each_update_is_opened_once_however_many_classes_there_are() -> None:
    opened: list[str] = []

    class Opening:
        def __init__(self, site: str) -> None:
            self._site = site

        def __enter__(self) -> Tensors:
            opened.append(self._site)
            return adapter(1, "mean")

        def __exit__(self, *_: object) -> None:
            pass

    has = {"bank": (0, 1), "clinic": (1, 2), "ward": (2, 3)}
    shares = {site: Share(WEIGHTS[site], layers("mean", *of)) for site, of in has.items()}
    given: Any = [(Origin(site, "", WEIGHTS[site]), Opening(site)) for site in WEIGHTS]
    fold(aggregation.make("mean", {}), begun("mean"), schema("mean"), given, tiers=[""], shares=shares)
    assert opened == [*WEIGHTS]


@pytest.mark.parametrize("name", STRATEGIES)
def test_whoever_is_named_first_the_bytes_are_the_same(name: str) -> None:
    last = begun(name)
    has = {"bank": layers(name, 0, 1), "clinic": layers(name, 1, 2), "ward": layers(name, 2)}
    updates = {site: adapter(seed, name) for seed, site in enumerate(WEIGHTS)}
    versions = [
        folded(name, updates, {site: Share(WEIGHTS[site], has[site]) for site in order}, last)
        for order in itertools.permutations(WEIGHTS)
    ]
    assert all(same(versions[0].adapter, one.adapter, schema(name)) for one in versions)


def test_a_strategy_that_folds_all_together_is_refused() -> None:
    together: Any = SimpleNamespace(name="together", begin=lambda last, schema: None)
    shares = {"bank": Share(1.0, layers("mean", 0))}
    with pytest.raises(InputError, match="strategy together folds all groups of tensors together, and these updates"):
        fold(together, begun("mean"), schema("mean"), [], tiers=[""], shares=shares)
