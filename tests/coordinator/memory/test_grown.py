"""An adapter for each task: no task writes over another's, and one that comes again goes on from its own."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from offsite.coordinator import memory
from offsite.coordinator.aggregation import Version
from offsite.coordinator.memory import Moment
from offsite.coordinator.memory.grown import Grown
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos.errors import InputError

SCHEMA: Schema = {
    "q.A": Field("F32", (None, 6), Rule.PRODUCT, "q"),
    "q.B": Field("F32", (5, None), Rule.PRODUCT, "q"),
}


def adapter(seed: int, rank: int = 3) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {"q.A": torch.randn(rank, 6, generator=draw), "q.B": torch.randn(5, rank, generator=draw)}


def folded(seed: int) -> Version:
    """What a round ends in, with two tiers and what a strategy keeps."""
    return Version(adapter(seed, 4), {"r1": adapter(seed + 1, 1), "r2.b": adapter(seed + 2, 2)}, {"m": adapter(seed)})


START = replace(folded(0), state={})


def learn(own: Grown, last: Version, task: str, *, seed: int, before: int = 1) -> Version:
    """A run of one round."""
    moments = [Moment(round=number, rounds=1, steps=1, before=before, task=task) for number in (0, 1)]
    begun = own.begin(last, START, SCHEMA, moments[0])
    return own.after(begun, folded(seed), SCHEMA, moments[1])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)


def test_each_task_keeps_what_it_ended_in_bit_for_bit_whatever_comes_later() -> None:
    own, last = Grown(), START
    for at, task in enumerate(("law", "physic", "code")):
        last = learn(own, last, task, seed=10 * at + 10, before=at)
        assert same(last.adapter, adapter(10 * at + 10, 4)) and "m" in last.state
    experts = own.experts(replace(last, broadcast={}))
    assert [*experts] == ["code", "law", "physic"], "the newest is the first"
    for task, seed in (("law", 10), ("physic", 20), ("code", 30)):
        assert same(experts[task], adapter(seed, 4))


@pytest.mark.parametrize("origin", ["start", "last"])
def test_a_new_task_begins_as_the_method_does_or_where_the_last_one_ended(origin: Any) -> None:
    own = Grown(origin=origin)
    last = learn(own, START, "law", seed=10, before=0)
    begun = own.begin(last, START, SCHEMA, Moment(round=0, rounds=1, steps=1, before=1, task="code"))
    expected = START if origin == "start" else last
    assert same(begun.adapter, expected.adapter) and same(begun.broadcast, expected.broadcast)
    assert [*begun.state] == ["memory.task.law"], "what a strategy kept was of another task"


def test_a_task_that_comes_again_goes_on_from_its_own_with_what_each_tier_starts_from() -> None:
    own = Grown()
    law = learn(own, START, "law", seed=10, before=0)
    code = learn(own, law, "code", seed=20)
    begun = own.begin(code, START, SCHEMA, Moment(round=0, rounds=1, steps=1, before=2, task="law"))
    assert same(begun.adapter, law.adapter) and same(begun.broadcast, law.broadcast)
    again = learn(own, code, "law", seed=30)
    assert [*own.experts(again)] == ["law", "code"]
    assert same(own.experts(again)["law"], adapter(30, 4)) and same(own.experts(again)["code"], adapter(20, 4))


def test_the_same_task_in_another_run_just_goes_on() -> None:
    own = Grown()
    law = learn(own, START, "law", seed=10, before=0)
    assert own.begin(law, START, SCHEMA, Moment(round=0, rounds=1, steps=1, before=1, task="law")) is law


def test_what_was_learned_without_a_memory_is_kept_as_well() -> None:
    own = Grown()
    last = learn(own, folded(10), "code", seed=20)
    assert same(own.experts(last)["earlier"], adapter(10, 4)) and [*own.experts(last)] == ["code", "earlier"]


def test_another_origin_is_refused() -> None:
    with pytest.raises(InputError, match="origin"):
        memory.make("grown", {"origin": "best"})
