"""The dynamic average: its weights by hand, where they hold, and what a run ends with."""

import pytest
import torch
from torch import Tensor

from offsite.coordinator import memory
from offsite.coordinator.aggregation import Version
from offsite.coordinator.memory import Moment
from offsite.coordinator.memory.ema import AVERAGE, BEFORE, Ema
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos.errors import InputError

MEAN: Schema = {"w": Field("F32", (2,), Rule.MEAN)}
PRODUCT: Schema = {
    "q.A": Field("F32", (None, 2), Rule.PRODUCT, "q"),
    "q.B": Field("F32", (1, None), Rule.PRODUCT, "q"),
}


def moment(number: int, *, before: int = 1, steps: int = 1) -> Moment:
    return Moment(round=number, rounds=3, steps=steps, before=before, task="")


def plain(*values: float) -> Version:
    adapter = {"w": torch.tensor(values)}
    return Version(adapter, {"": adapter})


def product(*values: float) -> Version:
    """A matrix (1, 2) as a product of rank 1, whose factors are not it."""
    adapter = {"q.B": torch.tensor([[2.0]]), "q.A": torch.tensor([values]) / 2}
    return Version(adapter, {"": adapter})


def matrix(adapter: Tensors) -> Tensor:
    return adapter["w"] if "w" in adapter else (adapter["q.B"] @ adapter["q.A"])[0]


@pytest.mark.parametrize(("make", "schema"), [(plain, MEAN), (product, PRODUCT)])
def test_the_weights_are_those_of_the_rule(make: type[Version], schema: Schema) -> None:
    own = Ema()
    last = own.begin(make(0.0, 0.0), make(0.0, 0.0), schema, moment(0))
    last = own.after(last, make(4.0, -2.0), schema, moment(1))
    # There is no gradient before the first: a hundredth.
    torch.testing.assert_close(matrix(last.state[AVERAGE]), torch.tensor([0.04, -0.02]), rtol=1e-6, atol=1e-6)
    assert last.figures == {"average_share": pytest.approx(0.01)} and matrix(last.adapter).tolist() == [4.0, -2.0]
    # g = (-1, 3), before (4, -2): 2 (1 + 4) / ((2.96 + 1.02) (5 + 5)) = 10 / 39.8.
    last = own.after(last, make(3.0, 1.0), schema, moment(2))
    share = 10 / 39.8
    expected = torch.tensor([0.04 + share * 2.96, -0.02 + share * 1.02])
    torch.testing.assert_close(matrix(last.state[AVERAGE]), expected, rtol=1e-6, atol=1e-6)
    assert last.figures == {"average_share": pytest.approx(share, rel=1e-6)}


@pytest.mark.parametrize("steps", [1, 10])
def test_where_the_rule_gives_no_share_a_step_weighs_the_least(steps: int) -> None:
    own = Ema()
    last = own.begin(plain(0.0, 0.0), plain(0.0, 0.0), MEAN, moment(0))
    for number, values in ((1, (0.01, 0.0)), (2, (0.02, 0.0))):  # so little moves that it would weigh more than 1
        last = own.after(last, plain(*values), MEAN, moment(number, steps=steps))
        assert last.figures == {"average_share": pytest.approx(1 - 0.99**steps)}


def test_a_run_ends_with_the_average_which_the_next_begins_with() -> None:
    own = Ema()
    last = own.begin(plain(0.0, 0.0), plain(0.0, 0.0), MEAN, moment(0))
    for number in (1, 2, 3):
        last = own.after(last, plain(float(number), 0.0), MEAN, moment(number))
        assert (BEFORE in last.state) == (last.adapter is not last.state[AVERAGE]) == (number < 3)
        assert own.experts(last)["average"] is last.state[AVERAGE]
    again = own.begin(last, last, MEAN, moment(0, before=4))
    assert again.adapter is again.state[AVERAGE] is last.state[AVERAGE]


def test_a_run_that_goes_on_in_the_midst_of_another_has_no_gradient_before() -> None:
    own = Ema()
    last = own.after(own.begin(plain(0.0, 0.0), plain(0.0, 0.0), MEAN, moment(0)), plain(1.0, 0.0), MEAN, moment(1))
    again = own.begin(last, last, MEAN, moment(0, before=2))
    assert BEFORE in last.state and again.state == {AVERAGE: last.state[AVERAGE]}


def test_before_the_first_task_there_is_nothing_to_keep() -> None:
    own = Ema()
    begun = own.begin(plain(0.0, 0.0), plain(0.0, 0.0), MEAN, moment(0, before=0))
    new = plain(1.0, 0.0)
    assert own.after(begun, new, MEAN, moment(3, before=0)) is new


def test_what_is_fixed_takes_no_part() -> None:
    schema = MEAN | {"at": Field("I64", (1,), Rule.FIXED, below=9)}
    start, new = plain(0.0, 0.0), plain(1.0, 1.0)
    for version in (start, new):
        version.adapter["at"] = torch.tensor([7])
    last = Ema().after(Ema().begin(start, start, schema, moment(0)), new, schema, moment(1))
    assert last.state[AVERAGE]["at"].tolist() == [7]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"least must be in \(0, 1\)"):
        memory.make("ema", {"least": 1.0})
