"""Rounds: who is asked, whom a round waits for, and which updates are in it."""

from typing import Any

import pytest

from offsite.coordinator.runs.steps.orders import Aggregate
from offsite.coordinator.runs.supervisor import Lost
from offsite.coordinator.store.journal import Key


def asked(stand: Any) -> list[Aggregate]:
    return [order for order in stand.done if isinstance(order, Aggregate)]


def sites(stand: Any) -> list[list[str]]:
    """Of each round those whose updates were folded."""
    return [[update.site for update in order.updates] for order in asked(stand)]


def step(stand: Any, name: str) -> Any:
    return stand.journal.steps("r")[name]


def test_a_round_says_who_was_asked_and_which_updates_it_ends_with(stand: Any) -> None:
    stand.act = lambda task: stand.close(task, "refused") if task.site == "bank" else stand.upload(task)
    stand.submit("bank", "ward", rounds=2)
    assert stand.run().state == "completed"
    for number in (1, 2):
        assert step(stand, f"roster:{number}")["tiers"] == {"bank": "r8", "ward": "r8"}
        (update,) = step(stand, f"close:{number}")["updates"]
        assert (update["site"], update["digest"]) == ("ward", asked(stand)[number - 1].updates[0].digest)


def test_what_comes_after_the_close_is_not_folded_by_whoever_takes_the_run_up(stand: Any) -> None:
    def killed(_: bytes) -> None:
        raise Lost

    whole, stand._aggregate = stand._aggregate, killed
    stand.act = lambda task: stand.close(task) if task.site == "bank" else stand.upload(task)
    stand.submit("bank", "ward")
    with pytest.raises(Lost):
        stand.run()
    stand.act, stand._aggregate = stand.upload, whole
    last = stand.journal.tasks("r")[0]
    again = Key("r", 0, "bank", 2)
    stand.journal.add_task(again, spec=last.spec, signature=last.signature)
    stand.upload(stand.journal.task(again))
    assert stand.run().state == "completed" and sites(stand) == [["ward"]]
