"""A journal in PostgreSQL: in the order of commits, one coordinator's, back with its server; faults are sentences."""

import importlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal, Key
from offsite.coordinator.store.opening import open_journal
from offsite.protos.errors import InputError, MismatchError, NotFoundError, OffsiteError, ResourceError
from offsite.protos.events import RoundDone, SiteState, StepBegun

DEADLINE_S = 60.0  # of what takes milliseconds: a test that hangs must fail


def wait_until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def at(postgresql: Any) -> str:
    """The URL of an empty schema."""
    return str(postgresql.empty())


@pytest.fixture
def journal(at: str) -> Iterator[Journal]:
    with closing(open_journal(at)) as made:
        made.add_run("r", token="t", owner="alice", spec=b"spec")
        yield made


def test_coordinators_share_a_database_in_schemas_of_their_own(postgresql: Any, journal: Journal) -> None:
    with (
        closing(open_journal(postgresql.empty())) as other,
        closing(journal.hold()) as one,
        closing(other.hold()) as two,
    ):
        assert one.take() and two.take()
        assert other.runs() == [] and [run.id for run in journal.runs()] == ["r"]


def test_a_column_sorts_by_bytes_and_holds_what_a_site_can_count(journal: Journal, postgresql: Any, at: str) -> None:
    columns = "FROM information_schema.columns WHERE table_schema = current_schema()"
    texts = f"SELECT DISTINCT collation_name {columns} AND data_type = 'character varying'"
    assert postgresql.admin(texts, at) == [("C",)]
    kinds = f"SELECT DISTINCT data_type {columns} AND data_type NOT IN ('character varying', 'bytea', 'json')"
    assert {kind for (kind,) in postgresql.admin(kinds, at)} == {"bigint", "double precision"}
    journal.enrol("a", examples=2**53)
    assert [site.examples for site in journal.sites()] == [2**53]
    with pytest.raises(NotFoundError):
        journal.task(Key("r", 2**32 - 1, "a", 2**32 - 1))


def test_a_text_that_the_database_cannot_hold_makes_nothing_fail(journal: Journal) -> None:
    key = Key("r", 0, "a", 0)
    journal.add_task(key, spec=b"task", signature=b"\0")
    journal.enrol("a", version="1\0", policy="\0")
    with pytest.raises(NotFoundError):
        journal.task(Key("\0", 0, "a", 0))
    text = "w\0rds \\u0000 \\\0"
    assert journal.set_task(key, SiteState(round=1, site="a", state="training", message=text), message=text)
    assert journal.add_step("r", "version:1", {text: text}) == {"w rds \\u0000 \\ ": "w rds \\u0000 \\ "}
    assert journal.task(key).message == "w rds \\u0000 \\ " == journal.events("r")[0].data["message"]
    assert journal.task(key).signature == b"\0" and journal.sites()[0].version == "1 "
    assert journal.thin("r", most=0) == 1, "what was told can be looked into"


def test_a_number_is_not_given_before_the_one_before_it_can_be_read(journal: Journal, postgresql: Any, at: str) -> None:
    with closing(open_journal(at)) as other:
        later = threading.Thread(target=other.add_event, args=("r", StepBegun(step="later")))
        with journal._write() as connection:
            later.start()
            wait_until(lambda: postgresql.admin("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
            connection.exec_driver_sql("INSERT INTO events (run, kind, data) VALUES ('r', 'first', '{}')")
        later.join(DEADLINE_S)
    assert [event.kind for event in journal.events("r")] == ["first", "step"]


@pytest.mark.slow(alone=True)
def test_a_hold_lasts_while_the_server_is_away_and_is_anybodys_when_it_is_back(
    journal: Journal, postgresql: Any
) -> None:
    with closing(journal.hold()) as hold, closing(journal.hold()) as other:
        assert hold.take() and not other.take()
        postgresql.kill()
        for one in (hold, other):
            with pytest.raises(Unwritable, match="cannot be reached"):
                one.take()
        postgresql.start()
        assert hold.take() and not other.take()
        hold._connection, ghost = psycopg.connect(postgresql.url()), hold._connection  # type: ignore[attr-defined]
        hold._connection.close()  # type: ignore[attr-defined]
        assert hold.take(), "though the server does not know that the session before it is over"
        ghost.close()
        postgresql.kill()
        postgresql.start()
        wait_until(other.take)
        assert not hold.take()


def test_who_watches_is_told_of_every_write_and_goes_on_after_the_server_was_away(
    journal: Journal, postgresql: Any, at: str
) -> None:
    with closing(open_journal(at)) as other, closing(journal.watch()) as watch:
        assert not watch.changed() and journal.runs() and not watch.changed()
        other.enrol("a")
        wait_until(watch.changed)
        assert not watch.changed(), "it was told"
        postgresql.kill()
        wait_until(watch.changed)
        assert not watch.changed()
        with pytest.raises(Unwritable, match="cannot be reached"):
            journal.runs()
        postgresql.start()
        wait_until(watch.changed)
        assert journal.runs(), "no connection of before is used"
        other.enrol("b")
        wait_until(watch.changed)


WRITER = """
import sys
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.opening import open_journal
from offsite.protos.events import StepBegun

journal, name = open_journal(sys.argv[1]), sys.argv[2]
for number in range(int(sys.argv[3])):
    while True:
        try:
            journal.add_step("r", f"{name} {number}", {}, *[StepBegun(step=f"{name} {number} {at}") for at in range(5)])
            break
        except Unwritable:
            pass
"""


@pytest.mark.slow(alone=True)
def test_who_reads_on_from_a_number_misses_nothing_of_what_processes_write_though_their_server_is_killed(
    url: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("postgresql") if url.startswith("postgresql") else None
    names, steps, told = ("one", "two"), 40, list[Any]()

    def follow(least: int) -> bool:
        if watch.changed():
            try:
                told.extend(journal.events("r", after=told[-1].seq if told else 0))
            except Unwritable:
                assert server, "nobody hinders a file"
        return len(told) >= least

    with closing(open_journal(url)) as journal, closing(journal.watch()) as watch:
        journal.add_run("r", token="t", owner="alice", spec=b"spec")
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, name, str(steps)]) for name in names]
        try:
            if server:
                wait_until(lambda: follow(20) and len({event.data["step"].split()[0] for event in told}) == len(names))
                server.kill()
                server.start()
            wait_until(lambda: follow(len(names) * steps * 5))
            assert [writer.wait(DEADLINE_S) for writer in writers] == [0, 0]
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
        assert [event.seq for event in told] == [event.seq for event in journal.events("r")]
    for name in names:
        mine = [event.data["step"] for event in told if event.data["step"].startswith(name)]
        assert mine == [f"{name} {number} {at}" for number in range(steps) for at in range(5)]


@pytest.fixture
def fit(postgresql: Any) -> Any:
    """The server with roles and databases that are not fit for a journal."""
    postgresql.admin("DROP ROLE IF EXISTS guarded")
    postgresql.admin("DROP ROLE IF EXISTS banned")
    postgresql.admin("DROP ROLE IF EXISTS reader")
    postgresql.admin("CREATE ROLE guarded LOGIN PASSWORD 'sesame'")
    postgresql.admin("CREATE ROLE banned LOGIN")
    postgresql.admin("CREATE ROLE reader LOGIN")
    if not postgresql.admin("SELECT 1 FROM pg_database WHERE datname = 'latin'"):
        postgresql.admin("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' STRATEGY file_copy")
    return postgresql


@pytest.mark.parametrize(
    ("where", "kind", "words"),
    [
        ({"role": "guarded:confidential"}, Unwritable, "refuses the password or the role"),
        ({"role": "guarded"}, Unwritable, "asks for a password; write it into the URL, or into ~/.pgpass"),
        ({"role": "banned:confidential"}, Unwritable, "lets nobody in from here with this role"),
        ({"role": "nobody:confidential"}, Unwritable, "does not know the role"),
        ({"database": "nothing"}, Unwritable, r"/nothing: the server has no such database; make it with `createdb`"),
        ({"database": "latin"}, InputError, "encoded in LATIN1; make one with `createdb --encoding UTF8`"),
        ({"schema": "nowhere"}, InputError, "names no schema that is there; make it"),
        ({"schema": "public", "role": "reader:confidential"}, Unwritable, "may not do this there; give it the rights"),
    ],
)
def test_what_hinders_a_journal_is_a_sentence_without_a_password(
    fit: Any, where: dict[str, str], kind: type[OffsiteError], words: str
) -> None:
    with pytest.raises(kind, match=words) as refused:
        open_journal(fit.url(**where))
    assert "confidential" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("password", ["confid@ential", "confid/ential", "confid/en@tial", "confid%zzential"])
def test_a_password_that_is_not_written_as_in_a_url_is_not_told_either(password: str) -> None:
    with pytest.raises(InputError, match="not a URL of PostgreSQL.* write @ as %40") as refused:
        open_journal(f"postgresql://me:{password}@127.0.0.1:1/offsite")
    assert "confid" not in str(refused.value) and "tial" not in str(refused.value)


def test_a_password_is_in_no_repr_and_opens_the_journal(fit: Any) -> None:
    fit.admin("CREATE SCHEMA IF NOT EXISTS guarded AUTHORIZATION guarded")
    with closing(open_journal(fit.url("guarded", role="guarded:sesame"))) as journal:
        assert "sesame" not in repr(journal._dialect) + repr(journal._engine) + repr(journal._engine.url)
        assert journal.runs() == []
    fit.admin("DROP SCHEMA guarded CASCADE")


def test_nothing_listens_and_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unwritable, match=r"postgresql://127.0.0.1:1/offsite: the server cannot be reached \(.*refused"):
        open_journal("postgresql://me:confidential@127.0.0.1:1/offsite")
    monkeypatch.delitem(sys.modules, "offsite.coordinator.store.postgresql")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delattr(importlib.import_module("offsite.coordinator.store"), "postgresql")
    with pytest.raises(ResourceError, match=r"psycopg is not installed; .* pip install 'offsite\[postgresql\]'"):
        open_journal("postgresql://127.0.0.1/offsite")


def test_a_journal_that_has_lost_a_table_is_damaged(journal: Journal, postgresql: Any, at: str) -> None:
    postgresql.admin("DROP TABLE events", at)
    with pytest.raises(MismatchError, match="the journal is damaged .*restore a backup"):
        journal.add_event("r", RoundDone(round=1, sites=1, figures={}))


def test_a_server_that_may_only_be_read_is_waited_for(journal: Journal, at: str) -> None:
    with closing(open_journal(f"{at}%20-cdefault_transaction_read_only%3Don")) as standby:
        assert standby.runs()
        with pytest.raises(Unwritable, match="may only be read; name the primary server"):
            standby.add_event("r", RoundDone(round=1, sites=1, figures={}))


def test_what_is_acknowledged_is_durable_whatever_the_database_is_set_to(at: str) -> None:
    with closing(open_journal(f"{at}%20-csynchronous_commit%3Doff")) as journal, journal._write() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"
