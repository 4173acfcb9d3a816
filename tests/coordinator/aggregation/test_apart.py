"""A fold by several threads: the bytes of every strategy are those of one, and what goes wrong in one is raised."""

from collections.abc import Iterator
from contextlib import nullcontext
from threading import Barrier, get_ident
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.folding import fold, fold_apart
from offsite.coordinator.aggregation.keyed import Share, Update
from offsite.kernels.bits import pack
from offsite.kernels.coded import encode
from offsite.kernels.schema import Field, Rule, Schema, Tensors, groups
from offsite.protos.errors import MismatchError

LAYERS = range(5)
FIELDS: Schema = {
    **{f"{at}.q.A": Field("F32", (None, 10), Rule.PRODUCT, f"{at}.q") for at in LAYERS},
    **{f"{at}.q.B": Field("F32", (8, None), Rule.PRODUCT, f"{at}.q") for at in LAYERS},
    **{f"{at}.norm": Field("F32", (5,), Rule.MEAN) for at in LAYERS},
    **{f"{at}.sum": Field("F32", (5,), Rule.SUM) for at in LAYERS},
    **{f"{at}.mask": Field("U8", (3,), Rule.VOTE, bits=21) for at in LAYERS},
    **{f"{at}.s.at": Field("I32", (None,), Rule.UNION, f"{at}.s", below=30) for at in LAYERS},
    **{f"{at}.s.values": Field("F32", (None,), Rule.UNION, f"{at}.s") for at in LAYERS},
    **{f"{at}.c.codes": Field("U8", (5,), Rule.REQUANTISE, f"{at}.c", bits=40, width=2) for at in LAYERS},
    **{f"{at}.c.line": Field("F32", (2,), Rule.REQUANTISE, f"{at}.c") for at in LAYERS},
}
WEIGHTS = {"bank": 0.5, "clinic": 0.3, "ward": 0.2}


def adapter(seed: int, schema: Schema) -> Tensors:
    draw, made = torch.Generator().manual_seed(seed), Tensors()
    for at in LAYERS:
        coded = encode(torch.randn(20, generator=draw), 2)
        made |= {f"{at}.q.A": torch.randn(3, 10, generator=draw), f"{at}.q.B": torch.randn(8, 3, generator=draw)}
        made |= {f"{at}.norm": torch.randn(5, generator=draw), f"{at}.sum": torch.randn(5, generator=draw)}
        made |= {f"{at}.s.at": torch.randperm(30, generator=draw)[:6].sort().values.int()}
        made |= {
            f"{at}.s.values": torch.randn(6, generator=draw),
            f"{at}.mask": pack(torch.randn(21, generator=draw) > 0),
        }
        made |= {f"{at}.c.codes": pack(coded.codes, 2), f"{at}.c.line": torch.tensor(coded[1:])}
    return {key: made[key] for key in schema}


class Round:
    """The updates of three sites, and who opened them."""

    def __init__(self, name: str) -> None:
        self.strategy = aggregation.make(name, {})
        self.schema = {key: field for key, field in FIELDS.items() if field.rule in self.strategy.rules}
        first = adapter(9, self.schema)
        self.last = Version(first, {"": first})
        self.shares: dict[str, Share] = {}
        self.threads, self.all = set[int](), Barrier(1)
        self._updates = {site: adapter(seed, self.schema) for seed, site in enumerate(WEIGHTS)}

    def lack(self) -> None:
        """Have each site lack a layer, and all of them the last."""
        for at, (site, weight) in enumerate(WEIGHTS.items()):
            self.shares[site] = Share(weight, [one for one in groups(self.schema) if one[0] not in (str(at), "4")])

    def updates(self) -> Iterator[Update]:
        self.threads.add(get_ident())
        self.all.wait(60)
        for site, weight in WEIGHTS.items():
            yield Origin(site, "", weight), nullcontext(self._updates[site])

    def fold(self) -> Version:
        return fold(self.strategy, self.last, self.schema, self.updates(), tiers=[""], shares=self.shares)

    def apart(self, threads: int) -> Version:
        given: Any = (self.strategy, self.last, self.schema, self.updates, threads)
        return fold_apart(*given, tiers=[""], shares=self.shares)


def same(one: Version, other: Version) -> bool:
    """Tell whether two versions have the same tensors, bit for bit, and the same figures."""
    pairs = [(one.adapter, other.adapter)]
    for its, others in ((one.broadcast, other.broadcast), (one.state, other.state)):
        assert its.keys() == others.keys()
        pairs += [(its[name], others[name]) for name in its]
    assert all(its.keys() == others.keys() for its, others in pairs)
    return one.figures == other.figures and all(
        torch.equal(its[key], others[key]) for its, others in pairs for key in its
    )


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("name", sorted(aggregation.STRATEGIES))
def test_whoever_folds_a_group_the_bytes_are_the_same(name: str, partial: bool) -> None:
    round_ = Round(name)
    if partial:
        round_.lack()
    whole = round_.fold()
    assert any(not torch.equal(one, round_.last.adapter[key]) for key, one in whole.adapter.items())
    for threads in (1, 2, 3, 99):
        version = round_.apart(threads)
        assert same(version, whole)
        assert (version.broadcast[""] is version.adapter) == (whole.broadcast[""] is whole.adapter)
    second = Round(name)
    second.last = whole
    assert same(second.apart(2), second.fold()), "on top of what the first round left to the owner"


def test_each_thread_opens_the_updates_for_itself_and_a_strategy_that_folds_all_together_has_one() -> None:
    round_, joins = Round("mean"), aggregation.make("mean", {})
    round_.all = Barrier(3)
    round_.apart(3)
    round_.all = Barrier(1)
    assert len(round_.threads) == 3

    class Together:
        """A mean that can join no parts."""

        rules, begin = joins.rules, staticmethod(joins.begin)

    alone: Any = Round("mean")
    alone.strategy = Together()
    assert same(alone.apart(3), round_.fold()) and alone.threads == {get_ident()}


def test_what_goes_wrong_with_a_group_is_raised_whichever_thread_has_it() -> None:
    for at in LAYERS:
        round_ = Round("mean")
        round_._updates["clinic"][f"{at}.norm"][2] = torch.inf
        with pytest.raises(MismatchError, match="the average of the updates is not finite"):
            round_.apart(2)
