"""What every memory owes, run over the family's own dict: two runs, of which the second goes on from the first."""

from dataclasses import replace

import pytest
import torch

from offsite.coordinator import memory
from offsite.coordinator.aggregation import Version
from offsite.coordinator.memory import MEMORIES, PREFIX, Memory, Moment
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos.documents import parse
from offsite.protos.ranges import Word

SCHEMA: Schema = {
    "0.q.A": Field("F32", (None, 10), Rule.PRODUCT, "0.q"),
    "0.q.B": Field("F32", (8, None), Rule.PRODUCT, "0.q"),
    "0.norm": Field("F32", (5,), Rule.MEAN, private=2),
    "0.index": Field("I64", (4,), Rule.FIXED, below=9),
}
ROUNDS = 3
ALL = sorted(MEMORIES)


def adapter(seed: int, rank: int = 3) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"0.q.A": (rank, 10), "0.q.B": (8, rank), "0.norm": (5,)}
    moving = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    return moving | {"0.index": torch.tensor([0, 8, 3, 3])}


FRESH = Version(adapter(0), {"r3": adapter(0)})  # what changes nothing


def folded(seed: int) -> Version:
    """What the fold of a round gives, with what its strategy keeps."""
    return Version(adapter(seed, rank=5), {"r3": adapter(seed)}, {"residual.r3": {"0.norm": torch.zeros(5)}})


def at(number: int, *, before: int = 0, task: str = "one") -> Moment:
    return Moment(round=number, rounds=ROUNDS, steps=4, before=before, task=task)


def run(own: Memory, start: Version, *, seed: int, before: int, task: str) -> list[Version]:
    """The versions of a run, and the one that it began from."""
    versions = [own.begin(start, FRESH, SCHEMA, at(0, before=before, task=task))]
    for number in range(1, ROUNDS + 1):
        moment = at(number, before=before, task=task)
        versions.append(own.after(versions[-1], folded(seed + number), SCHEMA, moment))
    return versions


def both(own: Memory) -> list[Version]:
    first = run(own, FRESH, seed=0, before=0, task="one")
    return first + run(own, first[-1], seed=10, before=ROUNDS, task="two")


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", ALL)
def test_the_same_versions_give_the_same_bytes_and_none_of_them_is_written_over(name: str) -> None:
    own = memory.make(name, {})
    once, again = both(own), both(own)
    for one, other in zip(once, again, strict=True):
        assert same(one.adapter, other.adapter) and one.state.keys() == other.state.keys()
        assert all(same(kept, other.state[key]) for key, kept in one.state.items())
        assert one.figures == other.figures
    last, new = once[-2], folded(99)
    copies = {key: tensor.clone() for key, tensor in (last.adapter | new.adapter).items()}
    own.after(last, new, SCHEMA, at(ROUNDS, before=ROUNDS))
    assert same(last.adapter | new.adapter, copies)


@pytest.mark.parametrize("name", ALL)
def test_what_strategies_keep_stays_and_all_else_has_the_prefix_and_a_short_name(name: str) -> None:
    for version in both(memory.make(name, {}))[1:ROUNDS]:
        assert same(version.state["residual.r3"], {"0.norm": torch.zeros(5)})
    for version in both(memory.make(name, {})):
        for key in version.state.keys() - {"residual.r3"}:
            assert key.startswith(PREFIX) and parse(Word, key, where="name") == key  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
def test_what_a_memory_keeps_and_answers_by_are_adapters_of_the_schema(name: str) -> None:
    own = memory.make(name, {})
    for version in both(own):
        experts = own.experts(replace(version, broadcast={}))
        assert experts and (len(experts) == 1 or own.combine != "one")
        for one in experts.values():
            assert one.keys() == SCHEMA.keys()
            assert one["0.q.A"].shape[0] == one["0.q.B"].shape[1] and one["0.norm"].dtype == torch.float32
            assert torch.equal(one["0.index"], version.adapter["0.index"])


@pytest.mark.parametrize("name", ALL)
def test_a_memory_travels_with_the_version_that_a_run_goes_on_from(name: str) -> None:
    own = memory.make(name, {})
    last = both(own)[-1]
    begun = own.begin(last, FRESH, SCHEMA, at(0, before=2 * ROUNDS, task="two"))
    assert same(begun.adapter, last.adapter) and begun.broadcast == last.broadcast
    assert begun.state.keys() == last.state.keys()
    assert all(same(kept, begun.state[key]) for key, kept in last.state.items())


@pytest.mark.parametrize("name", ALL)
def test_a_memory_that_accumulates_nothing_changes_nothing(name: str) -> None:
    own = memory.make(name, {})
    if own.accumulates:
        assert any(key.startswith(PREFIX) for key in both(own)[-1].state), "it says that it does"
        return
    version = folded(1)
    assert (
        own.begin(version, FRESH, SCHEMA, at(0)) is version and own.after(folded(0), version, SCHEMA, at(1)) is version
    )


@pytest.mark.parametrize("name", ALL)
def test_a_memory_says_whether_it_gives_another_adapter_than_the_fold(name: str) -> None:
    own = memory.make(name, {})
    versions = both(own)
    rounds = [*versions[1 : ROUNDS + 1], *versions[ROUNDS + 2 :]]
    folds = [folded(seed + number) for seed in (0, 10) for number in range(1, ROUNDS + 1)]
    others = [not same(one.adapter, fold.adapter) for one, fold in zip(rounds, folds, strict=True)]
    assert any(others) == own.replaces
