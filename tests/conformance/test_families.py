"""What every plug-in of every family owes, run over the families' own dicts."""

import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation, memory
from offsite.coordinator.aggregation import Origin, Strategy, Version
from offsite.emulator import (
    builders,
    formats,
    methods,
    modality,
    objectives,
    optimisers,
    parts,
    placements,
    retention,
    schedules,
)
from offsite.emulator.builders.base import Builder, ChangeBuilder, DepthBuilder
from offsite.kernels.bits import pack, unpack
from offsite.kernels.coded import decode, encode, read
from offsite.kernels.schema import Field, Rule, Schema, Tensors

FAMILIES: dict[str, tuple[dict[str, Any], Any]] = {
    "builder": (dict(builders.BUILDERS), builders.make),
    "format": (dict(formats.FORMATS), formats.make),
    "memory": (dict(memory.MEMORIES), memory.make),
    "method": (dict(methods.METHODS), methods.make),
    "modality": (dict(modality.MODALITIES), modality.MODALITIES.make),
    "objective": (dict(objectives.OBJECTIVES), objectives.make),
    "optimiser": (dict(optimisers.OPTIMISERS), optimisers.make),
    "part": (dict(parts.PARTS), parts.make),
    "placement": (dict(placements.PLACEMENTS), placements.make),
    "retention": (dict(retention.RETENTIONS), retention.make),
    "schedule": (dict(schedules.SCHEDULES), schedules.make),
    "strategy": (dict(aggregation.STRATEGIES), aggregation.make),
}
PROTOCOLS: dict[str, Any] = {
    "builder": Builder,
    "format": formats.Format,
    "memory": memory.Memory,
    "method": methods.Method,
    "modality": modality.Modality,
    "objective": objectives.Objective,
    "optimiser": optimisers.Optimiser,
    "part": parts.Part,
    "placement": placements.Placement,
    "retention": retention.Retention,
    "schedule": schedules.Schedule,
    "strategy": aggregation.Strategy,
}
PLUG_INS = [(family, name) for family, (known, _) in FAMILIES.items() for name in known]
STRATEGIES = sorted(aggregation.STRATEGIES)


@pytest.mark.parametrize(("family", "name"), PLUG_INS)
def test_a_plug_in_is_a_frozen_dataclass_that_runs_on_its_defaults(family: str, name: str) -> None:
    known, make = FAMILIES[family]
    made = make(name, {})
    assert is_dataclass(made) and type(made) is known[name] and made.name == name
    setting = fields(made)[0].name if fields(made) else "anything"
    with pytest.raises((FrozenInstanceError, AttributeError)):
        setattr(made, setting, None)


@pytest.mark.parametrize(("family", "name"), PLUG_INS)
def test_a_plug_in_has_what_its_family_promises(family: str, name: str) -> None:
    kind = FAMILIES[family][0][name]
    protocol = PROTOCOLS[family]
    if protocol is Builder:
        protocol = DepthBuilder if kind.stage == "depth" else ChangeBuilder
    for base in protocol.__mro__:
        for member in getattr(base, "__annotations__", {}):
            assert hasattr(kind, member), f"{name} does not say its {member}"
    for member, promised in inspect.getmembers(protocol, inspect.isfunction):
        if not member.startswith("_"):
            own, due = (inspect.signature(one).parameters for one in (getattr(kind, member), promised))
            assert [(p.name, p.kind) for p in own.values()] == [(p.name, p.kind) for p in due.values()], member


@pytest.mark.parametrize(("family", "name"), PLUG_INS)
def test_an_unknown_setting_is_named(family: str, name: str) -> None:
    with pytest.raises(Exception, match="no_such_setting"):
        FAMILIES[family][1](name, {"no_such_setting": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_name_is_answered_with_the_known_ones(family: str) -> None:
    known, make = FAMILIES[family]
    with pytest.raises(Exception, match=", ".join(sorted(known))):
        make("no-such-thing", {})


SCHEMA: Schema = {
    "0.q.A": Field("F32", (None, 10), Rule.PRODUCT, "0.q"),
    "0.q.B": Field("F32", (8, None), Rule.PRODUCT, "0.q"),
    "0.norm": Field("F32", (5,), Rule.MEAN),
    "0.index": Field("I64", (4,), Rule.FIXED, below=9),
    "0.s.at": Field("I32", (None,), Rule.UNION, "0.s", below=30),
    "0.s.values": Field("F32", (None,), Rule.UNION, "0.s"),
    "0.mask": Field("U8", (2,), Rule.VOTE, bits=11),
    "0.c.codes": Field("U8", (2,), Rule.REQUANTISE, "0.c", bits=11),
    "0.c.line": Field("F32", (2,), Rule.REQUANTISE, "0.c"),
    "0.total": Field("F32", (4,), Rule.SUM),
}
SHARES = [0.4, 0.35, 0.25]  # of which no one is a majority


def schema(strategy: Strategy) -> Schema:
    """What of the schema a strategy folds."""
    return {key: field for key, field in SCHEMA.items() if field.rule in strategy.rules}


def updates(count: int) -> list[Tensors]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"0.q.A": (3, 10), "0.q.B": (8, 3), "0.norm": (5,), "0.s.values": (6,), "0.total": (4,)}
    made = []
    for _ in range(count):
        one = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
        one["0.index"] = torch.tensor([0, 8, 3, 3])
        one["0.s.at"] = torch.randperm(30, generator=draw)[:6].sort().values.int()
        one["0.mask"] = pack(torch.rand(11, generator=draw) < 0.5)
        coded = encode(torch.randn(11, generator=draw), 1)
        one |= {"0.c.codes": pack(coded.codes), "0.c.line": torch.tensor([coded.mean, coded.deviation])}
        made.append(one)
    return made


def folded(strategy: Strategy, given: list[tuple[Tensors, float]]) -> Version:
    last = updates(1)[0] | {"0.total": torch.zeros(4)}
    fold = strategy.begin(Version(last, {"r3": last}), schema(strategy))
    for at, (update, weight) in enumerate(given):
        fold.add({key: update[key] for key in schema(strategy)}, Origin(f"site-{at}", "r3", weight))
    return fold.finish(["r3"])


def effects(adapter: Tensors) -> list[torch.Tensor]:
    """What an adapter does, however it is written down."""
    matrices = [adapter["0.q.B"].double() @ adapter["0.q.A"].double()] if "0.q.A" in adapter else []
    if "0.s.at" in adapter:
        matrices.append(torch.zeros(30).double().index_add(0, adapter["0.s.at"], adapter["0.s.values"].double()))
    if "0.mask" in adapter:
        matrices.append(unpack(adapter["0.mask"], 11).double())
    if "0.c.codes" in adapter:
        matrices.append(decode(read(adapter["0.c.codes"], adapter["0.c.line"], 11, 1), 1))
    return matrices + [adapter[key].double() for key in ("0.norm", "0.index", "0.total") if key in adapter]


def pooled(each: list[Any], rule: Rule) -> Any:
    """What values of three sites are together by a rule: of sums the sum, and of all others the mean."""
    return sum(each if rule is Rule.SUM else [share * one for share, one in zip(SHARES, each, strict=True)])


@pytest.mark.parametrize("name", STRATEGIES)
def test_sites_that_agree_are_averaged_to_what_they_agree_on(name: str) -> None:
    strategy, only = aggregation.make(name, {}), updates(1)[0]
    version = folded(strategy, [(only, share) for share in SHARES])
    agreed = only | {"0.total": 3 * only["0.total"]}
    wanted = effects({key: agreed[key] for key in schema(strategy)})
    assert version.adapter.keys() == version.broadcast["r3"].keys() == schema(strategy).keys()
    torch.testing.assert_close(effects(version.adapter), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_site_is_passed_through_bit_for_bit(name: str) -> None:
    (only,) = updates(1)
    version = folded(aggregation.make(name, {}), [(only, 1.0)])
    for tensors, total in ((version.adapter, only["0.total"]), (version.broadcast["r3"], torch.zeros(4))):
        expected = only | {"0.total": total}  # no site is sent what was measured
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    given = list(zip(updates(3), SHARES, strict=True))
    one, other = (folded(aggregation.make(name, {}), [given[at] for at in order]) for order in ([0, 1, 2], [2, 0, 1]))
    torch.testing.assert_close(effects(one.adapter), effects(other.adapter), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(effects(one.broadcast["r3"]), effects(other.broadcast["r3"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_makes_the_mean_of_what_tensors_do_by_each_rule_that_it_calls_exact(name: str) -> None:
    strategy = aggregation.make(name, {})
    version = folded(strategy, list(zip(updates(3), SHARES, strict=True)))
    exact = set()
    for rule in strategy.rules:
        keys = [key for key, field in schema(strategy).items() if field.rule is rule]
        each = [effects({key: update[key] for key in keys}) for update in updates(3)]
        mean = [pooled(list(effect), rule) for effect in zip(*each, strict=True)]
        made = effects({key: version.adapter[key] for key in keys})
        if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made, mean, strict=True)):
            exact.add(rule)
    assert exact == strategy.exact


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_that_needs_only_the_sum_makes_the_same_of_the_sum(name: str) -> None:
    strategy = aggregation.make(name, {})
    given = list(zip(updates(3), SHARES, strict=True))
    summed = ("0.q.A", "0.q.B", "0.norm", "0.total")
    total = {key: pooled([update[key] for update, _ in given], SCHEMA[key].rule) for key in summed}
    alone = folded(strategy, [(given[0][0] | total, 1.0)])
    every = folded(strategy, given)
    same = [
        torch.allclose(a, b, atol=1e-5) for a, b in zip(effects(alone.adapter), effects(every.adapter), strict=True)
    ]
    assert all(same) == (strategy.needs == "sum")
