"""A mixture of shards as a store: what each task keeps, what all share, and how slowly that moves."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from offsite.coordinator import memory
from offsite.coordinator.aggregation import Version
from offsite.coordinator.memory import Moment
from offsite.coordinator.memory.shard_store import ShardStore
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import Place
from offsite.emulator.methods.mos import materialise
from offsite.protos.errors import InputError

PLACES = {0: 0, 2: 2, 5: 5}
METHOD = make("mos", {"budget": 2, "rank": 4, "shards": 4, "private": 1, "modules": ("down_proj",)})
PATH = "mlp.down_proj"
COMMON = 12  # of 24 shards of a pool, the first
POOLS = tuple(f"0.{PATH}.pool_{factor}" for factor in "AB")


@pytest.fixture
def start(tiny: Any) -> Version:
    adapter = METHOD.start(tiny(), PLACES, seed=0)
    return Version(adapter, {"": adapter})


def moved(adapter: Adapter, seed: int) -> Version:
    draw = torch.Generator().manual_seed(seed)
    new = {key: one + 0.1 * torch.randn(one.shape, generator=draw) for key, one in adapter.items() if "pool" in key}
    return Version(adapter | new, {"": adapter | new})


def learn(own: ShardStore, last: Version, start: Version, task: str, *, seed: int, before: int = 1) -> list[Version]:
    """The versions of a run of two rounds, of five steps each, and the one that it began from."""
    schema = METHOD.schema(start.adapter)
    moments = [Moment(round=number, rounds=2, steps=5, before=before, task=task) for number in range(3)]
    versions = [own.begin(last, start, schema, moments[0])]
    for moment in moments[1:]:
        new = moved(versions[-1].adapter, seed + moment.round)
        versions.append(own.after(versions[-1], new, schema, moment))
    return versions


def same(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_new_task_begins_with_private_shards_that_change_nothing_beside_the_common_ones(start: Version) -> None:
    own = ShardStore()
    law = learn(own, start, start, "law", seed=10, before=0)[-1]
    code = learn(own, law, start, "code", seed=20)[0]
    for pool in POOLS:
        assert torch.equal(code.adapter[pool][:COMMON], law.adapter[pool][:COMMON])
        assert torch.equal(code.adapter[pool][COMMON:], start.adapter[pool][COMMON:])
    for layer in PLACES.values():
        begun, before = (materialise(one.adapter)[Place(layer, PATH)] for one in (code, law))
        torch.testing.assert_close(begun.B @ begun.A, before.B[:, :3] @ before.A[:3])
        assert not begun.B[:, 3].any() and before.B[:, 3].any()


def test_with_frozen_common_shards_earlier_tasks_answer_bit_for_bit_as_they_did(start: Version) -> None:
    own, last, ends = ShardStore(c=0.0), start, dict[str, Adapter]()
    for at, task in enumerate(("law", "physic", "code")):
        last = learn(own, last, start, task, seed=10 * at, before=at)[-1]
        ends[task] = last.adapter
    experts = own.experts(replace(last, broadcast={}))
    assert [*experts] == ["code", "law", "physic"]
    assert all(same(experts[task], end) for task, end in ends.items())
    for pool in POOLS:
        assert not torch.equal(ends["physic"][pool][COMMON:], ends["law"][pool][COMMON:])
    kept = sum(one.numel() for one in last.state["memory.task.law"].values())
    assert kept == sum(ends["law"][pool].numel() for pool in POOLS) // 2, "a task adds its private shards, not a pool"


def test_common_shards_move_by_the_closed_form_and_private_ones_by_all_of_it(start: Version) -> None:
    own = ShardStore(c=2.0)
    law = learn(own, start, start, "law", seed=10, before=0)
    for at in (1, 2):
        assert same(law[at].adapter, moved(law[at - 1].adapter, 10 + at).adapter), "in the first task all is new"
    code = learn(own, law[-1], start, "code", seed=20)
    share = 1 - (1 - 2 / 10) ** 5
    for at in (1, 2):
        last, one, new = code[at - 1].adapter, code[at].adapter, moved(code[at - 1].adapter, 20 + at).adapter
        for pool in POOLS:
            expected = last[pool][:COMMON] + share * (new[pool] - last[pool])[:COMMON]
            torch.testing.assert_close(one[pool][:COMMON], expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(one[pool][COMMON:], new[pool][COMMON:])
        assert code[at].figures == {"common_share": pytest.approx(share)}
    for pool in POOLS:
        served = own.experts(code[-1])["law"][pool]
        assert torch.equal(served[COMMON:], law[-1].adapter[pool][COMMON:])
        assert torch.equal(served[:COMMON], code[-1].adapter[pool][:COMMON])


def test_a_task_that_comes_again_takes_up_its_own_shards(start: Version) -> None:
    own = ShardStore()
    law = learn(own, start, start, "law", seed=10, before=0)[-1]
    code = learn(own, law, start, "code", seed=20)[-1]
    again = learn(own, code, start, "law", seed=30)
    assert same(again[0].adapter, own.experts(code)["law"]) and [*own.experts(again[-1])] == ["law", "code"]
    begun = learn(own, again[-1], start, "law", seed=40)[0]
    assert begun is again[-1], "a run with the same task just goes on"


def test_the_schema_says_what_no_two_layers_share(start: Version) -> None:
    schema = METHOD.schema(start.adapter)
    assert {key: field.private for key, field in schema.items() if field.private} == dict.fromkeys(POOLS, 12)
    for factor in "AB":
        taken = [{*start.adapter[f"{layer}.{PATH}.index_{factor}"].flatten().tolist()} for layer in PLACES.values()]
        for at, one in enumerate(taken):
            rest = set().union(*taken[:at], *taken[at + 1 :])
            assert {*range(COMMON + 4 * at, COMMON + 4 * at + 4)} <= one and all(row < COMMON for row in one & rest)
    assert not any(field.private for field in make("mos", {"private": 0}).schema(start.adapter).values())


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="c must be at least 0, got -1"):
        memory.make("shard-store", {"c": -1.0})
