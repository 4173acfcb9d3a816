"""Supervisors as threads of one process: libraries keep there what only one step at a time may use."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.runs.executor import InProcess
from offsite.coordinator.runs.needs import Needs
from offsite.coordinator.runs.steps import performing


def test_steps_of_several_runs_are_done_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kit: Path
) -> None:
    both = Barrier(2, timeout=0.2)

    def perform(*_: object) -> bytes:
        try:
            both.wait()
        except BrokenBarrierError:
            return b"alone"
        return b"together"

    monkeypatch.setattr(performing, "perform", perform)
    executor = InProcess(Home(tmp_path / "home", kit).prepare())
    with ThreadPoolExecutor(2) as runs:
        steps = [runs.submit(executor._perform, "build", b"", b"", Needs()) for _ in range(2)]
    assert [step.result() for step in steps] == 2 * [b"alone"]
