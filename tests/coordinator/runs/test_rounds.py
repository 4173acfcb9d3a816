"""Rounds: who is asked, whom a round waits for, and which updates are in it."""

import itertools
import json
from typing import Any

import pytest

from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs import outs, quorum
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import GRANT
from offsite.coordinator.runs.steps.orders import Aggregate
from offsite.coordinator.runs.supervisor import Lost
from offsite.coordinator.store.journal import Key
from offsite.protos.documents import from_json, to_plain
from offsite.protos.errors import ConflictError, InputError, NotFoundError
from offsite.protos.spec import RunSpec, TaskSpec


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


SLOW = {"bank": 1000.0, "clinic": 100.0, "school": 100.0, "ward": 100.0}  # seconds that a task takes
STEP_S = 12.5


@pytest.fixture
def clock(stand: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets time pass while the supervisor rests, STEP_S at once; sites take as long as they are told to."""

    class Clock:
        now, takes = 1e6, SLOW

        def rest(self, _: float) -> None:
            self.now += STEP_S
            for task in stand.journal.open_tasks(*self.takes):
                began = self._began.setdefault((task.round, task.site), self.now - STEP_S)
                if self.now - began >= self.takes[task.site]:
                    stand.upload(task)

        def __init__(self) -> None:
            self._began: dict[tuple[int, str], float] = {}

    clock = Clock()
    monkeypatch.setattr("time.time", lambda: clock.now)
    stand.rest = clock.rest
    return clock


def rounds_s(stand: Any) -> list[float]:
    """Seconds of each round."""
    begun, done = ([event.at for event in stand.journal.events("r", kind=kind)] for kind in ("begun", "round"))
    return [end - begin for begin, end in zip(begun, done, strict=True)]


def states(stand: Any, site: str) -> list[tuple[int, str]]:
    return [(task.round, task.state) for task in stand.journal.tasks("r") if task.site == site]


def test_without_a_quorum_all_are_waited_for(stand: Any, clock: Any) -> None:
    stand.submit(*SLOW, rounds=2, stall_s=9999.0)
    stand.run()
    assert sites(stand) == 2 * [sorted(SLOW)] and min(rounds_s(stand)) >= 1000


def test_who_holds_a_round_up_is_said(stand: Any, clock: Any) -> None:
    def rest(seconds: float) -> None:
        clock.rest(seconds)
        notes.add(stand.journal.run("r").note)

    notes, stand.rest = set[str](), rest
    stand.submit(*SLOW, stall_s=9999.0)
    stand.run()
    assert notes == {"", "round 1 waits for bank; 3 of 4 are done, and a quorum would let it go on"}
    assert stand.journal.run("r").note == ""


def test_once_the_quorum_is_in_the_others_have_a_share_of_what_it_took(stand: Any, clock: Any) -> None:
    stand.submit(*SLOW, rounds=4, quorum=3, grace=0.25)
    assert stand.run().state == "completed"
    assert sites(stand) == 4 * [["clinic", "school", "ward"]] and all(took == 125 for took in rounds_s(stand))
    assert states(stand, "bank") == [(number, "late") for number in range(4)]
    (message,) = {task.message for task in stand.journal.tasks("r") if task.site == "bank" and task.round < 3}
    assert message == "its round closed without its update"


def test_whoever_comes_within_the_window_is_in_the_round(stand: Any, clock: Any) -> None:
    clock.takes = SLOW | {"bank": 120.0}
    stand.submit(*SLOW, quorum=3, grace=0.25)
    stand.run()
    assert sites(stand) == [sorted(SLOW)] and rounds_s(stand)[0] <= 125, "nobody is left to wait for"


def test_one_early_bird_does_not_shorten_the_window(stand: Any, clock: Any) -> None:
    clock.takes = {"bank": 12.5, "clinic": 100.0, "school": 120.0}
    stand.submit(*clock.takes, quorum=2, grace=0.25)
    stand.run()
    assert sites(stand) == [["bank", "clinic", "school"]]


def test_a_late_update_is_folded_later_against_the_broadcast_that_it_was_given(stand: Any, clock: Any) -> None:
    stand.submit(*SLOW, rounds=11, quorum=3, staleness=10, stall_s=9999.0)
    assert stand.run().state == "completed"
    assert states(stand, "bank") == [(0, "uploaded"), (9, "late")], "no second task before the first is done"
    (late,) = [(number, one) for number, order in enumerate(asked(stand)) for one in order.updates if one.age]
    assert late[0] == 9 == late[1].age and late[1].site == "bank"
    assert late[1].start == step(stand, "version:0")["version"]["broadcast"]["r8"]["digest"]
    assert step(stand, "version:10")["late"]["bank"]["age"] == 9
    told = [
        event.data["message"] for event in stand.journal.events("r", kind="site") if event.data["state"] == "folded"
    ]
    assert told == ["its late update, of round 1, is in this one at 32% of its weight"]
    assert max(rounds_s(stand)) <= 1.3 * 100
    late = json.loads(stand.journal.run("r").report)["late"]
    assert late == [{"round": 1, "site": "bank", "folded_in": 10, "weight": 0.25}]


def test_a_site_that_is_done_with_an_old_task_has_the_newest_one_at_once(stand: Any, clock: Any) -> None:
    clock.takes = SLOW | {"bank": 130.0}
    stand.submit(*SLOW, rounds=4, quorum=3, staleness=1)
    stand.run()
    folded = [[(one.site, one.age) for one in order.updates if one.site == "bank"] for order in asked(stand)]
    assert folded == [[], [("bank", 1)], [("bank", 1)], [("bank", 1)]]
    tasks = [from_json(TaskSpec, task.spec, where="task") for task in stand.journal.tasks("r") if task.site == "bank"]
    assert [task.round for task in tasks] == [0, 1, 2, 3]


def test_an_update_that_is_too_old_is_dropped_and_its_site_told(stand: Any, clock: Any) -> None:
    stand.submit(*SLOW, rounds=5, quorum=3, staleness=2, stall_s=9999.0)
    stand.run()
    assert states(stand, "bank") == [(0, "late"), (3, "late")] and not any(
        one.age for o in asked(stand) for one in o.updates
    )
    first, last = (task.message for task in stand.journal.tasks("r") if task.site == "bank")
    assert first == "its update did not come within 2 rounds" and last == "the last round closed without its update"


@pytest.mark.parametrize("staleness", [0, 8])
def test_a_kill_between_the_close_and_the_fold_changes_nothing(stand: Any, clock: Any, staleness: int) -> None:
    def killed(order: bytes) -> Any:
        if next(folds) in (2, 5):
            clock.now += 2000  # meanwhile the slow one comes
            clock.rest(1.0)
            raise Lost
        return whole(order)

    folds, whole, stand._aggregate = itertools.count(), stand._aggregate, killed
    stand.submit(*SLOW, rounds=6, quorum=3, staleness=staleness, stall_s=9999.0)
    kills = 0
    while stand.journal.run("r").state == "running":
        closed = {name: value for name, value in stand.journal.steps("r").items() if name.startswith("close:")}
        try:
            stand.run()
        except Lost:
            kills += 1
        assert closed.items() <= stand.journal.steps("r").items()
    digests = [[one["digest"] for one in step(stand, f"close:{number}")["updates"]] for number in range(1, 7)]
    assert kills == 2 and [[one.digest for one in order.updates] for order in asked(stand)] == digests


def test_a_coordinator_that_was_away_gives_the_window_anew(stand: Any, clock: Any) -> None:
    def away(_: float) -> None:
        clock.rest(1.0)
        if clock.now >= 1e6 + 115 and not gone:
            gone.append(clock.now)
            clock.now += 500
            raise Lost

    gone: list[float] = []
    clock.takes = SLOW | {"bank": 115 + 500 + 20.0}
    stand.rest = away
    stand.submit(*SLOW, quorum=3)
    with pytest.raises(Lost):
        stand.run()
    stand.run()
    assert sites(stand) == [sorted(SLOW)]


def rosters(stand: Any, rounds: int) -> list[list[str]]:
    return [[*step(stand, f"roster:{number}")["tiers"]] for number in range(1, rounds + 1)]


def test_a_round_draws_its_sites_anew_and_another_run_of_the_seed_the_same(stand: Any) -> None:
    stand.submit("bank", "clinic", "school", "ward", rounds=6, sites_per_round=2)
    stand.run()
    drawn = rosters(stand, 6)
    assert sites(stand) == drawn and {len(names) for names in drawn} == {2} and len({*map(tuple, drawn)}) > 2
    spec = RunSpec(model="m", sites_per_round=2)
    names = ["bank", "clinic", "school", "ward"]
    assert drawn == [quorum.drawn(names, spec, seed=f"0 sample {number}") for number in range(6)]
    assert quorum.drawn(names, RunSpec(model="m"), seed="") == names


def test_of_more_sites_than_a_round_needs_the_slowest_are_not_waited_for(stand: Any, clock: Any) -> None:
    stand.submit(*SLOW, rounds=2, sites_per_round=3, spare=0.3)
    stand.run()
    assert sites(stand) == 2 * [["clinic", "school", "ward"]] and rounds_s(stand) == [100, 100]
    assert rosters(stand, 2) == 2 * [sorted(SLOW)] and states(stand, "bank") == [(0, "late"), (1, "late")]


@pytest.mark.parametrize("join", [True, False])
def test_who_comes_after_the_start_takes_part_from_the_next_round_if_the_run_says_so(stand: Any, join: bool) -> None:
    def act(task: Any) -> None:
        if task.round == 1:
            stand.journal.enrol("late")
        stand.upload(task)

    stand.act = act
    stand.submit("bank", "ward", rounds=4, join=join)
    assert stand.run().state == "completed"
    more = ["bank", "late", "ward"] if join else ["bank", "ward"]
    assert sites(stand) == rosters(stand, 4) == [*2 * [["bank", "ward"]], *2 * [more]]
    first = [from_json(TaskSpec, task.spec, where="task") for task in stand.journal.tasks("r") if task.site == "late"]
    assert [task.adapter for task in first[:1]] == [asked(stand)[2].last.broadcast["r8"].digest] * join
    joined = [event.data["joined"] for event in stand.journal.events("r", kind="begun")]
    assert joined == [[], [], ["late"] * join, []]


def test_no_more_sites_join_a_researchers_run_than_the_owner_allows(stand: Any) -> None:
    stand.home.keep(OwnerPolicy(max_sites=3))
    for site in ("late", "later"):
        stand.journal.enrol(site)
    stand.submit("bank", "ward", rounds=2, join=True)
    grant = Grant(model="m", role="researcher", rounds=2, join=True)
    stand.journal.add_step("r", GRANT.name, to_plain(grant))
    stand.run()
    assert rosters(stand, 2) == [["bank", "ward"], ["bank", "late", "ward"]]


def test_a_run_goes_on_without_a_site_that_was_ejected(stand: Any) -> None:
    def act(task: Any) -> None:
        if task.site == "bank" and task.round == 1:
            outs.eject(stand.journal, "r", "bank", by="olga", reason="its update was poison")
        else:
            stand.upload(task)

    stand.act = act
    stand.submit("bank", "ward", rounds=4)
    assert stand.run().state == "completed"
    assert sites(stand) == [["bank", "ward"], *3 * [["ward"]]]
    assert states(stand, "bank") == [(0, "uploaded"), (1, "out")] and rosters(stand, 4)[2:] == 2 * [["ward"]]
    (told,) = stand.journal.events("r", kind="out")
    assert (told.site, told.data) == ("bank", {"by": "olga", "reason": "its update was poison"})


def test_an_update_that_had_come_is_not_folded_once_its_site_is_out(stand: Any) -> None:
    def act(task: Any) -> None:
        stand.upload(task)
        if task.site == "bank":
            for reason in ("poison", "again"):
                outs.eject(stand.journal, "r", "bank", by="olga", reason=reason)

    stand.act = act
    stand.submit("bank", "ward", min_sites=2)
    assert stand.run().error == "round 1 got 1 of at least 2 updates (bank: out: olga: poison)"


def test_a_site_leaves_one_run_or_all_and_nobody_waits_for_it(stand: Any) -> None:
    stand.act = lambda task: stand.upload(task) if task.site == "ward" else outs.leave(stand.journal, "bank")
    for site in ("bank", "ward"):
        stand.journal.enrol(site)
    stand.submit("bank", "ward", rounds=2)
    with pytest.raises(NotFoundError, match="site town takes no part in a run r that is not over"):
        outs.leave(stand.journal, "town", run="r")
    assert stand.run().state == "completed" and sites(stand) == 2 * [["ward"]]
    assert stand.journal.present(1.0) == ["ward"] and outs.leave(stand.journal, "bank") == []


def test_who_may_not_be_ejected_is_said_in_a_sentence(stand: Any) -> None:
    def eject(site: str = "bank", reason: str = "why") -> None:
        outs.eject(stand.journal, "r", site, by="olga", reason=reason)

    stand.submit()
    with pytest.raises(ConflictError, match="run r is queued: no site has been chosen yet"):
        eject()
    stand.journal.begin_run("r", ["bank"])
    with pytest.raises(NotFoundError, match="site town takes no part in run r; those that do: bank"):
        eject("town")
    with pytest.raises(InputError, match="ejected for a reason"):
        eject(reason=" ")
    stand.run()
    with pytest.raises(ConflictError, match="run r is completed: it is over"):
        eject()
