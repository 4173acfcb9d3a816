"""Rounds over real processes, of sites that take as long as they are told: whom they wait for, who comes and goes."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import pytest
from typer.testing import CliRunner

from offsite.client import Event
from offsite.client.commands import run as commands
from offsite.client.commands import site
from offsite.protos import fleet_pb2 as pb
from offsite.protos.errors import OffsiteError

from .conftest import Rogue

TAKES_S = {"clinic": 1.5, "school": 1.5, "ward": 1.5, "slow": 15.0}


class Paced:
    """A site that sends back what it was sent, a given time later, until it is closed."""

    def __init__(self, federation: Any, name: str, takes_s: float) -> None:
        self.rounds: list[int] = []
        self._site, self._takes_s, self._closed = Rogue(federation, name), takes_s, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OffsiteError):  # whose task was ended meanwhile
                reply = self._site.channel.call(self._site.fleet.PullTask, pb.PullTaskRequest(wait_s=1), timeout_s=30)
                if reply.task:
                    self._do()

    def _do(self) -> None:
        task, begun = self._site.pull(), time.monotonic()
        self.rounds.append(task.round)
        key, adapter = pb.TaskKey(run=task.run, round=task.round, attempt=task.attempt), self._site.broadcast(task)
        while (left := self._takes_s - (time.monotonic() - begun)) > 0:
            reply = self._site.channel.call(self._site.fleet.Report, pb.ReportRequest(key=key, state=pb.TRAINING))
            if reply.stop or self._closed.wait(min(left, 0.5)):
                return
        self._site.upload(task, adapter)

    def leave(self) -> list[str]:
        asked = ["leave", self._site.channel.target, "--identity", str(self._site.kit), "--reason", "audit"]
        return list(json.loads(CliRunner().invoke(site.app, [*asked, "--format", "json"]).stdout)["left"])

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._site.channel.close()


@pytest.fixture
def paced(federation: Any) -> Iterator[Any]:
    """Makes sites of a federation whose coordinator runs."""
    federation.coordinate()
    sites: dict[str, Paced] = {}

    def make(*names: str) -> dict[str, Paced]:
        sites.update({name: Paced(federation, name, TAKES_S.get(name, 1.0)) for name in names})
        return sites

    yield make
    for one in sites.values():
        one.close()


def rounds_s(events: list[Event]) -> list[float]:
    begun, done = ([event.at for event in events if event.kind == kind] for kind in ("begun", "round"))
    return [end - begin for begin, end in zip(begun, done, strict=True)]


@pytest.mark.slow
def test_a_site_that_is_ten_times_slower_holds_nobody_up_and_its_work_is_used(federation: Any, paced: Any) -> None:
    paced(*TAKES_S)
    quick = tuple(name for name in TAKES_S if name != "slow")
    with federation.connect() as session:
        alone = rounds_s([*session.submit(federation.spec(sites=quick, rounds=4)).watch()])
        run = session.submit(federation.spec(sites=(*quick, "slow"), rounds=12, quorum=3, staleness=12))
        events, versions = [*run.watch()], session.versions(run.id)
    assert run.state == "completed", run.error
    together = rounds_s(events)
    assert mean(together) <= 1.3 * median(alone)  # each of them: tests/coordinator/runs/test_rounds.py
    late = run.report["late"][0]
    assert (late["round"], late["site"]) == (1, "slow") and late["folded_in"] > 2 and 0 < late["weight"] < 0.25
    assert "slow" in versions[late["folded_in"] - 1].sites and "slow" not in versions[0].sites


@pytest.mark.slow
def test_sites_join_leave_and_are_ejected_while_a_run_goes_on(federation: Any, paced: Any) -> None:
    sites = paced("clinic", "school", "ward")
    with federation.connect() as session:
        run = session.submit(federation.spec(rounds=6, join=True, min_sites=2))
        for event in run.watch():
            if event.kind == "begun" and event.round == 2:
                paced("late")
            if event.kind == "begun" and event.round == 4:
                who = ["--coordinator", federation.address, "--identity", str(federation.owner)]
                said = CliRunner().invoke(
                    commands.app, ["eject", run.id, "school", *who, "--reason", "it points elsewhere"]
                )
                assert said.stdout == f"run {run.id} goes on without school\n"
                assert sites["ward"].leave() == [run.id]
        versions = session.versions(run.id)
        events = [*run.watch()]
    assert run.state == "completed", run.error
    three, four = ("clinic", "school", "ward"), ("clinic", "late", "school", "ward")
    assert [one.sites for one in versions] == [three, three, four, *3 * [("clinic", "late")]]
    out = {event.site: event.data for event in events if event.kind == "out"}
    assert out == {
        "school": {"by": "olga", "reason": "it points elsewhere"},
        "ward": {"by": "ward", "reason": "audit"},
    }
