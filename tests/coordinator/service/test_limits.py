"""What one caller may take, and what counts as progress."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from offsite.coordinator.service import limits, progress
from offsite.coordinator.service.limits import Limits, check_request
from offsite.coordinator.service.progress import Pace, ahead
from offsite.coordinator.store.journal import Journal, Key
from offsite.coordinator.store.opening import open_journal
from offsite.protos import fleet_pb2 as pb
from offsite.protos.errors import InputError, ResourceError

KEY = Key(run="r", round=0, site="a", attempt=0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = open_journal(f"sqlite://{tmp_path}/journal.db")
    made.add_run("r", token="t", owner="alice", spec=b"spec")
    made.add_task(KEY, spec=b"task", signature=b"s")
    return made


def test_a_certificate_that_calls_without_end_waits_and_another_does_not() -> None:
    clock = Clock()
    counted = Limits(clock=clock)

    def call(serial: int) -> None:
        with counted.call(serial):
            pass

    for _ in range(int(limits.BURST)):
        call(1)
    with pytest.raises(ResourceError, match="more than 50 calls a second; wait"):
        call(1)
    call(2)
    clock.now += 1
    for _ in range(int(limits.RATE)):
        call(1)
    with pytest.raises(ResourceError):
        call(1)
    clock.now += 2 * limits.BURST / limits.RATE
    call(3)
    assert len(counted) == 1, "nothing is kept of who is idle"


def test_calls_and_transfers_in_progress_are_bounded_for_each_and_in_all() -> None:
    counted = Limits(clock=Clock())
    with ExitStack() as stack:
        for _ in range(limits.CALLS):
            stack.enter_context(counted.call(1))
        with pytest.raises(ResourceError, match="32 calls in progress"):
            stack.enter_context(counted.call(1))
        for _ in range(limits.TRANSFERS):
            stack.enter_context(counted.transfer(1))
        with pytest.raises(ResourceError, match="4 transfers in progress"):
            stack.enter_context(counted.transfer(1))
        for serial in range(2, 1 + limits.ALL_TRANSFERS // limits.TRANSFERS):
            for _ in range(limits.TRANSFERS):
                stack.enter_context(counted.call(serial))
                stack.enter_context(counted.transfer(serial))
        stack.enter_context(counted.call(99))
        with pytest.raises(ResourceError, match="the coordinator has 64"):
            stack.enter_context(counted.transfer(99))
    with counted.call(1), counted.transfer(1):
        pass


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.UploadHeader(key=pb.TaskKey(run="x" * 4_000_000)), "run: 4000000 characters came, at most 128"),
        (pb.ReportRequest(loss=float("nan")), "loss: nan"),
        (pb.ReportRequest(bytes_down=2**63), "bytes_down: 9223372036854775808"),
        (pb.PullTaskRequest(wait_s=float("inf")), "wait_s: inf"),
        (pb.UploadPart(data=b"x" * ((1 << 20) + 1)), "data: 1048577"),
    ],
)
def test_a_request_beyond_its_bounds_is_refused(request_: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_request(request_)  # type: ignore[arg-type]  # the cases are messages


def test_going_back_and_forth_is_no_progress(journal: Journal) -> None:
    def further(state: str, step: int, received: int = 0) -> bool:
        return ahead(journal.task(KEY), state=state, step=step, received=received)

    assert further("downloading", 0, 10)
    journal.set_task(KEY, state="training", step=7, bytes_down=10)
    for state, step, received in (("training", 6, 99), ("training", 7, 10), ("loading", 9, 99), ("downloading", 0, 99)):
        assert not further(state, step, received)
    assert further("training", 8) and further("training", 7, 11) and further("uploading", 0)


def test_a_task_that_goes_on_is_told_of_ever_more_seldom(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("offsite.coordinator.service.progress.time.time", clock)
    pace = Pace()
    for half in range(2000, 2060):  # seconds 1000 to 1030 of a task, twice a second
        move = pace.move(KEY, journal.task(KEY), state="training", step=0 if half == 2000 else half)
        assert move is None or journal.move_tasks([move]) == [True]
        clock.now += 0.5 if half > 2000 else 1000
    assert journal.task(KEY).step >= 2058, "the task's own row is told every second"
    assert 3 <= len(journal.events("r")) <= 5, "an event comes with every hundredth of the task's age"
    assert len(pace) == 1
    pace.forget(KEY)
    assert len(pace) == 0


def test_of_tasks_that_are_not_heard_of_again_nothing_is_kept(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("offsite.coordinator.service.progress.time.time", clock)
    pace, task = Pace(), journal.task(KEY)
    pace.move(KEY, task, state="taken")
    clock.now += 1.5 * progress.FORGET_S
    pace.move(KEY._replace(site="b"), task, state="taken")
    assert len(pace) == 1
