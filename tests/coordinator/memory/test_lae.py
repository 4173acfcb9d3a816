"""LAE: the offline adapter is the average that its formula says, in the space of weights, and what serves is said."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.coordinator import memory
from offsite.coordinator.aggregation import Version
from offsite.coordinator.memory import Moment
from offsite.coordinator.memory.lae import OFFLINE, Lae
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos.errors import InputError

SCHEMA: Schema = {
    "q.A": Field("F32", (None, 24), Rule.PRODUCT, "q"),
    "q.B": Field("F32", (20, None), Rule.PRODUCT, "q"),
    "norm": Field("F32", (7,), Rule.MEAN),
}


def version(seed: int) -> Version:
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"q.A": (3, 24), "q.B": (20, 3), "norm": (7,)}
    adapter = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    return Version(adapter, {"": adapter})


def values(adapter: Tensors) -> list[Tensor]:
    return [adapter["q.B"].double() @ adapter["q.A"].double(), adapter["norm"].double()]


def moment(number: int, *, rounds: int = 9, steps: int = 5, before: int = 3) -> Moment:
    return Moment(round=number, rounds=rounds, steps=steps, before=before, task="two")


def test_after_many_rounds_it_is_the_closed_form_of_the_average() -> None:
    own, start = Lae(), version(0)
    last = own.begin(start, start, SCHEMA, moment(0))
    decay = (1 - 2 / 45) ** 5
    expected = [decay**9 * value for value in values(start.adapter)]
    for number in range(1, 10):
        last = own.after(last, version(number), SCHEMA, moment(number))
        assert last.figures == {"offline_share": pytest.approx(1 - decay)}
        for at, value in enumerate(values(last.adapter)):
            expected[at] = expected[at] + (1 - decay) * decay ** (9 - number) * value
    for made, value in zip(values(last.state[OFFLINE]), expected, strict=True):
        torch.testing.assert_close(made, value, rtol=1e-6, atol=1e-6)


def test_as_much_is_kept_over_a_run_however_its_steps_are_parted() -> None:
    for rounds, steps in ((1, 40), (8, 5), (40, 1)):
        kept = Lae().kept(moment(1, rounds=rounds, steps=steps)) ** rounds
        assert kept == pytest.approx(0.95**40)
    assert Lae(c=4.0).kept(moment(1, rounds=2, steps=50)) == pytest.approx(0.96**50)
    assert Lae(c=5.0).kept(moment(1, rounds=1, steps=4)) == 0, "nothing is left of what was after so few steps"


def test_before_the_first_task_there_is_nothing_to_keep() -> None:
    own = Lae()
    begun = own.begin(version(0), version(0), SCHEMA, moment(0, before=0))
    last = own.after(begun, version(1), SCHEMA, moment(1, before=0))
    assert last.state == {} and last.adapter is last.broadcast[""]
    assert [*own.experts(last)] == ["online"] and [*Lae(serve="offline").experts(last)] == ["offline"]
    assert Lae(serve="offline").experts(last)["offline"] is last.adapter


def test_it_goes_on_where_the_run_before_left_it() -> None:
    own, start = Lae(), version(0)
    second = own.after(own.begin(start, start, SCHEMA, moment(0)), version(1), SCHEMA, moment(1))
    third = own.begin(second, second, SCHEMA, moment(0, before=12))
    assert third.state[OFFLINE] is second.state[OFFLINE] and third.adapter is second.adapter


@pytest.mark.parametrize(
    ("serve", "experts", "combine"),
    [("ensemble", ["online", "offline"], "max"), ("online", ["online"], "one"), ("offline", ["offline"], "one")],
)
def test_what_serves_is_a_setting(serve: Any, experts: list[str], combine: str) -> None:
    own = Lae(serve=serve)
    last = own.after(own.begin(version(0), version(0), SCHEMA, moment(0)), version(1), SCHEMA, moment(1))
    given = own.experts(replace(last, broadcast={}))
    assert [*given] == experts and own.combine == combine
    assert given[experts[-1]] is (last.adapter if serve == "online" else last.state[OFFLINE])


def test_a_rank_bounds_what_is_kept() -> None:
    own = Lae(rank=4)
    last = own.begin(version(0), version(0), SCHEMA, moment(0))
    for number in range(1, 4):
        last = own.after(last, version(number), SCHEMA, moment(number))
        assert last.state[OFFLINE]["q.A"].shape == (4, 24)


@pytest.mark.parametrize(("settings", "words"), [({"c": 0.0}, "c must be above 0"), ({"rank": -1}, "at least 0")])
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        memory.make("lae", settings)
