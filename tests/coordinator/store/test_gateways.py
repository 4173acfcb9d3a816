"""Gateways that share a journal: one of them holds it, all are alike, and who has dispatched since is known."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from offsite.coordinator.store import gateways
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal
from offsite.protos.errors import ConflictError

DEADLINE_S = 60.0  # of what takes milliseconds: a test that hangs must fail
HOLDER = """
import sys
from offsite.coordinator.store.opening import open_journal
hold = open_journal(sys.argv[1]).hold()
print(hold.take(), flush=True)
sys.stdin.read()
"""
ABOUT: dict[str, Any] = {"address": "10.0.0.1:8443", "version": "1", "started_at": 1.0}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def journal(url: str) -> Iterator[Journal]:
    with closing(open_journal(url)) as made:
        yield made


def test_a_hold_is_one_process_s_until_that_is_killed(journal: Journal, url: str) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, url], **pipes) as holder:
        with closing(journal.hold()) as hold, closing(journal.hold()) as third:
            assert holder.stdout is not None and holder.stdout.readline() == "True\n"
            assert not hold.take() and not hold.take()
            holder.kill()
            holder.wait()
            wait_until(hold.take)  # a server needs a moment to notice
            assert hold.take() and not third.take()
            hold.close()
            wait_until(third.take)
            assert not hold.take()


def test_gateways_that_are_here_have_one_policy_and_one_key(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.announce("north", policy="p", owner="o", **ABOUT)
    journal.announce("south", policy="p", owner="o", **ABOUT)
    with pytest.raises(ConflictError, match=r"north at 10.0.0.1:8443 .* another owner's policy; start all with the"):
        journal.announce("west", policy="q", owner="o", **ABOUT)
    with pytest.raises(ConflictError, match="another owner's key; give both kits of the same authority"):
        journal.announce("west", policy="p", owner="x", **ABOUT)
    assert [one.name for one in journal.gateways()] == ["north", "south"], "who is refused is not one of them"
    journal.leave("north")
    journal.announce("south", policy="q", owner="o")
    assert [(one.name, one.policy, one.address) for one in journal.gateways()] == [("south", "q", "10.0.0.1:8443")]
    now = gateways.time.time()
    monkeypatch.setattr("offsite.coordinator.store.gateways.time.time", lambda: now + gateways.HERE_S + 1)
    journal.announce("west", policy="r", owner="x", **ABOUT)
    assert [one.name for one in journal.gateways()] == ["west"], "one that was not heard is not here"
    assert [one.name for one in journal.gateways(within_s=60)] == ["south", "west"]


def test_a_term_is_new_whenever_another_gateway_has_dispatched_in_between(journal: Journal) -> None:
    assert journal.leader() is None
    first = journal.lead("north")
    assert journal.leader() == first == journal.lead("north")
    assert journal.lead("south") not in (first, journal.lead("north"))
    again = journal.leader()
    assert again is not None and again.name == "north" and again != first
