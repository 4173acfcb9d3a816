"""How long a run waits for its sites: for who gets no further, and for who takes too long."""

import itertools
from typing import Any

import pytest

from offsite.coordinator.runs.supervisor import Lost


class Clock:
    """The time, which passes only while the supervisor rests."""

    def __init__(self, stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._rest = 1e6, stand.rest
        monkeypatch.setattr("time.time", lambda: self.now)
        stand.rest = self.rest

    def rest(self, seconds: float) -> None:
        self.now += 10
        self._rest(seconds)


def test_a_site_that_gets_no_further_is_left_out(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, took = Clock(stand, monkeypatch), []

    def act(task: Any) -> None:
        if task.site == "ward" and clock.now > 1e6 + 200:
            stand.upload(task)
        elif task.site == "ward" or not took:
            took.append(task.site)
            stand.move(task, step=len(took))

    stand.act = act
    stand.submit("bank", "ward", stall_s=50.0)
    stand.run()
    bank, ward = stand.journal.tasks("r")
    assert (bank.state, bank.message) == ("stalled", "got no further for 50 s") and ward.state == "uploaded"
    stalled = [event for event in stand.journal.events("r", kind="site") if event.data["state"] == "stalled"]
    assert [(event.site, event.round, event.data["message"]) for event in stalled] == [("bank", 1, bank.message)]


def test_a_site_that_is_here_and_busy_with_another_run_is_waited_for(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(stand, monkeypatch)
    for site in ("bank", "ward"):
        stand.journal.enrol(site)

    def act(task: Any) -> None:
        if task.site == "ward":  # bank was never heard of again
            stand.journal.see("ward")
            if clock.now > 1e6 + 200:
                stand.upload(task)

    stand.act = act
    stand.submit("bank", "ward", stall_s=50.0)
    stand.run()
    assert [task.state for task in stand.journal.tasks("r")] == ["stalled", "uploaded"]


def test_a_site_where_a_person_is_to_decide_is_waited_for_until_its_longest_time(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(stand, monkeypatch)
    for site in ("bank", "ward"):
        stand.journal.enrol(site)

    def act(task: Any) -> None:
        stand.journal.see(task.site)
        if task.state == "offered":
            stand.move(task, state="awaiting approval")
        elif task.site == "ward" and clock.now > 1e6 + 200:
            stand.upload(task)

    stand.act = act
    stand.submit("bank", "ward", stall_s=50.0, task_s=300.0)
    stand.run()
    bank, ward = stand.journal.tasks("r")
    assert (bank.state, bank.message) == ("stalled", "was not done 300 s after it took its task")
    assert ward.state == "uploaded"


def test_a_task_has_a_longest_time_that_neither_progress_nor_a_restart_nor_an_attempt_renews(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, steps = Clock(stand, monkeypatch), itertools.count(1)

    def act(task: Any) -> None:
        if clock.now == 1e6 + 40:
            stand.close(task)
        else:
            stand.move(task, step=next(steps))
        if clock.now == 1e6 + 70:
            raise Lost

    stand.act = act
    stand.submit("ward", stall_s=50.0, task_s=100.0)
    with pytest.raises(Lost):
        stand.run()
    assert "(ward: stalled: was not done 100 s after it took its task)" in stand.run().error
    assert clock.now == 1e6 + 10 + 110, "it took its task after 10 s"
    assert [task.attempt for task in stand.journal.tasks("r")] == [0, 1]


def test_while_no_coordinator_was_up_no_site_could_get_further(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(stand, monkeypatch)

    def act(task: Any) -> None:
        raise Lost

    stand.act = act
    stand.submit("ward", stall_s=50.0)
    with pytest.raises(Lost):
        stand.run()
    clock.now += 1000
    stand.act = stand.upload
    assert stand.run().state == "completed"
