"""What sites measure of their rows, through a whole run, tells whether a task is one that is known."""

from typing import Any

import pytest

from offsite.client import Choice, TrainingSpec
from offsite.client.site.policy import Policy
from offsite.emulator import routing
from offsite.emulator.methods import own_format

from .conftest import Do


@pytest.mark.slow(alone=True)
@pytest.mark.parametrize("name", [pytest.param("signature", marks=pytest.mark.slow), "prototype"])
def test_a_run_publishes_sums_of_its_rows_by_which_the_same_task_is_known_again(do: Do, name: str) -> None:
    measuring: dict[str, Any] = {"method": Choice(name=name), "strategy": Choice(name="sum")}
    training = TrainingSpec(steps=4, batch_size=4, max_length=32, seed=3)  # each site's rows once
    policy = Policy(bases=("any",), data=("/",), methods=(name,), min_rows=1)
    first, again = (
        own_format.read(do(out, sites=sites, policy=policy, training=training, rounds=1, **measuring).out / "adapter")
        for out, sites in (("first", 8), ("again", 4))
    )
    method, sums = first
    assert isinstance(method, routing.Telling)
    assert method.parts(sums)["count"].item() == 8 * 16 and method.parts(again[1])["count"].item() == 4 * 16
    assert routing.same_task(method, again[1], {"hospital": sums}, threshold=0.9) == "hospital"
