"""Requests for certificates, and the newest list: kept once, whoever writes and how often, in each database."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from offsite.coordinator.store import memberships
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.memberships import Decision
from offsite.coordinator.store.opening import open_journal
from offsite.coordinator.store.tables import lists, requests
from offsite.protos.errors import RefusedError


@pytest.fixture
def journal(url: str) -> Iterator[Journal]:
    made = open_journal(url)
    yield made
    made.close()


def signed(key: str) -> Decision:
    return Decision("a1", key, b"certificate", "")


def test_a_request_is_kept_once_and_answered_with_the_list_that_lets_in(journal: Journal) -> None:
    for request in (b"first", b"again"):
        journal.ask("a1", "key", request)
    (row,) = journal.unsigned(most=9)
    assert (row.caller, row.key, row.request) == ("a1", "key", b"first")
    assert journal.asked("a1", "key").state == "unsigned" and journal.list_pem() == b""
    journal.decide([signed("key")], number=7, pem=b"seventh")
    journal.ask("a1", "key", b"after that")
    assert journal.unsigned(most=9) == []
    row = journal.asked("a1", "key")
    assert (row.state, row.certificate, journal.list_number(), journal.list_pem()) == (
        "signed",
        b"certificate",
        7,
        b"seventh",
    )


def test_what_was_refused_is_decided_anew_when_it_is_asked_again(journal: Journal) -> None:
    journal.ask("a1", "key", b"first")
    journal.decide([Decision("a1", "key", b"", "the name is taken")], number=1, pem=b"list")
    assert journal.asked("a1", "key").refusal == "the name is taken"
    journal.ask("a1", "key", b"again")
    (row,) = journal.unsigned(most=9)
    assert (row.request, row.refusal) == (b"again", "")


def test_one_certificate_asks_for_few_keys(journal: Journal) -> None:
    for number in range(memberships.KEYS):
        journal.ask("a1", f"key-{number}", b"request")
    with pytest.raises(RefusedError, match="8 other keys already"):
        journal.ask("a1", "one more", b"request")
    journal.ask("a1", "key-3", b"request")
    journal.ask("b2", "one more", b"request")
    assert len(journal.unsigned(most=99)) == memberships.KEYS + 1


def test_an_answer_that_nobody_wants_any_longer_goes(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("old", "waits"):
        journal.ask("a1", key, b"request")
    journal.decide([signed("old")], number=1, pem=b"list")
    monkeypatch.setattr(memberships, "KEPT_S", -1.0)
    journal.decide([], number=2, pem=b"list")
    with journal._engine.connect() as connection:
        assert [row.key for row in connection.execute(sa.select(requests))] == ["waits"]
    assert journal.asked("a1", "waits").at <= time.time()


def test_of_lists_the_one_with_the_highest_number_is_kept_whoever_comes_last(url: str, journal: Journal) -> None:
    journal.keep_list(5, b"five")
    journal.keep_list(4, b"four")
    journal.decide([], number=3, pem=b"three")
    assert (journal.list_number(), journal.list_pem()) == (5, b"five")
    others = [open_journal(url) for _ in range(4)]
    with ThreadPoolExecutor() as pool:  # several gateways with the same news
        list(pool.map(lambda one: [one.keep_list(number, b"%d" % number) for number in (6, 9, 9, 8)], others))
        list(pool.map(lambda one: one.ask("c3", "key", b"request"), others))
    assert (journal.list_number(), journal.list_pem()) == (9, b"9")
    with journal._engine.connect() as connection:
        assert [row.number for row in connection.execute(sa.select(lists))] == [9]
    assert len(journal.unsigned(most=9)) == 1
    for other in others:
        other.close()
