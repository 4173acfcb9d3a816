"""The journal and the blobs: the first word stands, repeats change nothing, a full disk is said to be full."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy

from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal, Key, Move
from offsite.coordinator.store.opening import open_journal
from offsite.protos.chunks import digest_bytes
from offsite.protos.errors import ConflictError, MismatchError, NotFoundError
from offsite.protos.events import Cancelled, Completed, RoundDone, SiteOut, SiteState

KEY = Key(run="r", round=0, site="a", attempt=0)


@pytest.fixture
def journal(url: str) -> Iterator[Journal]:
    made = open_journal(url)
    made.add_run("r", token="t", owner="alice", spec=b"spec")
    yield made
    made.close()


def test_a_submission_is_counted_once(journal: Journal) -> None:
    assert journal.add_run("r2", token="t", owner="alice", spec=b"spec").id == "r"
    with pytest.raises(ConflictError, match="for run r with another spec"):
        journal.add_run("r3", token="t", owner="alice", spec=b"other")
    assert [run.id for run in journal.runs()] == ["r"]


def test_a_run_goes_on_from_a_version_or_that_is_taken_back_and_never_both(journal: Journal, url: str) -> None:
    def granted(number: int) -> dict[str, Any]:
        return {"continues": {"run": "r", "round": number, "rounds": number}}

    journal.withdraw({"r": [1]}, by="olga", reason="it forgot")
    with pytest.raises(ConflictError, match=r"start: r:1 was just taken back by olga \(it forgot\); name another"):
        journal.add_run("no", token="no", owner="alice", spec=b"{}", granted=granted(1))
    assert [run.id for run in journal.runs()] == ["r"] and journal.steps("no") == {}
    journal.add_run("s", token="s", owner="alice", spec=b"{}", granted=granted(2))
    with pytest.raises(ConflictError, match="run s has just gone on from r:2; cancel it or wait"):
        journal.withdraw({"r": [3, 2]}, by="olga", reason="why")
    assert journal.withdrawn("rs").keys() == {("r", 1)}
    journal.withdraw({"r": [2], "s": []}, by="olga", reason="why")
    assert journal.add_run("s", token="s", owner="alice", spec=b"{}", granted=granted(2)).id == "s", "a repeated one"

    def tried(act: Callable[[], object]) -> bool:
        together.wait()
        try:
            act()
        except ConflictError:
            return False
        return True

    together = Barrier(2)
    with closing(open_journal(url)) as other, ThreadPoolExecutor(2) as people:
        for number in range(10, 20):
            given = {"token": f"{number}", "owner": "alice", "spec": b"{}", "granted": granted(number)}
            goes = people.submit(tried, partial(journal.add_run, f"on-{number}", **given))
            back = people.submit(tried, partial(other.withdraw, {"r": [number]}, by="olga", reason="why"))
            assert goes.result() != back.result(), number


def test_a_run_ends_once(journal: Journal) -> None:
    journal.end_run("r", Cancelled(error="by alice"))
    journal.end_run("r", Completed(), report="{}", published={"adapter": Stored(digest=digest_bytes(b"a"), size=1)})
    journal.set_run("r", state="running")
    assert (journal.run("r").state, journal.run("r").error) == ("cancelled", "by alice")
    assert [event.kind for event in journal.events("r")] == ["cancelled"]
    assert journal.run("r").report == "" and journal.artifacts("r") == []


def test_a_step_is_recorded_once(journal: Journal) -> None:
    assert journal.add_step("r", "version:1", {"exact": "first"}) == {"exact": "first"}
    assert journal.add_step("r", "version:1", {"exact": "second"}) == {"exact": "first"}
    assert journal.steps("r") == {"version:1": {"exact": "first"}}


def test_a_closed_task_stays_closed(journal: Journal) -> None:
    journal.add_task(KEY, spec=b"task", signature=b"s")
    journal.add_task(KEY, spec=b"other", signature=b"s")
    assert [task.spec for task in journal.open_tasks("a")] == [b"task"]
    assert journal.set_task(KEY, state="training", step=3)
    assert journal.set_task(KEY, state="uploaded", update="digest")
    assert not journal.set_task(KEY, state="failed"), "an update that was acknowledged cannot be lost"
    assert journal.task(KEY).update == "digest" and journal.open_tasks("a") == []


def test_a_round_knows_when_its_updates_came_and_who_is_still_at_an_older_one(journal: Journal) -> None:
    for number, site in ((0, "a"), (0, "b"), (0, "c"), (1, "a")):
        journal.add_task(Key("r", number, site, 0), spec=b"task", signature=b"s")
    assert journal.arrival("r", 0, 1) is None and journal.busy("r", before=1) == {"a", "b", "c"}
    for site, at in (("b", 30.0), ("a", 20.0)):
        journal.set_task(Key("r", 0, site, 0), state="uploaded", update=site, moved_at=at)
    assert [journal.arrival("r", 0, number) for number in (1, 2, 3)] == [20.0, 30.0, None]
    assert journal.busy("r", before=1) == {"c"} and journal.busy("r", before=2) == {"a", "c"}


def test_what_came_after_a_round_had_closed_is_in_no_other_and_what_is_open_ends(journal: Journal) -> None:
    for site in ("a", "b", "c"):
        journal.add_task(Key("r", 0, site, 0), spec=b"task", signature=b"s")
    for site in ("a", "b"):
        journal.set_task(Key("r", 0, site, 0), state="uploaded", update=site)
    for _ in range(2):
        journal.end_late("r", 0, entered={"a"}, message="too late")
    assert [(task.state, task.update) for task in journal.tasks("r")] == [("uploaded", "a"), ("late", ""), ("late", "")]
    assert journal.newest_updates("r") == {"a": "a"} and journal.open_tasks("a", "b", "c") == []
    told = [(event.site, event.data["state"], event.data["message"]) for event in journal.events("r")]
    assert told == [("b", "late", "too late"), ("c", "late", "too late")]


def test_a_site_does_what_it_began_then_the_highest_priority_then_whoever_it_served_longest_ago(
    journal: Journal,
) -> None:
    for run, owner, priority in (("a1", "ann", 0), ("a2", "ann", 0), ("b1", "bob", 0), ("c1", "cid", 3)):
        journal.add_run(run, token=run, owner=owner, spec=json.dumps({"priority": priority}).encode())
        journal.add_task(Key(run, 0, "s", 0), spec=run.encode(), signature=b"s")
    done = []
    for at in (10.0, 20.0, 30.0, 40.0):
        (task,) = journal.next_tasks(["s"])
        assert task is not None
        journal.set_task(Key(task.run, 0, "s", 0), state="training", moved_at=at)
        assert journal.next_tasks(["s"])[0].run == task.run  # type: ignore[union-attr]
        journal.set_task(Key(task.run, 0, "s", 0), state="uploaded", update=task.run)
        done.append(task.run)
    assert done == ["c1", "a1", "b1", "a2"] and journal.next_tasks(["s"]) == [None]


def test_a_site_that_is_out_stays_so_for_the_first_reason(journal: Journal) -> None:
    for run in ("r", "r"):
        for reason in ("poison", "another"):
            journal.put_out(run, SiteOut(site="a", by="olga", reason=reason))
    assert journal.outs("r") == {"a": "olga: poison"} and len(journal.events("r", kind="out")) == 1
    journal.add_task(KEY, spec=b"task", signature=b"s")
    journal.end_tasks("r", "a", "olga: poison")
    assert (journal.task(KEY).state, journal.task(KEY).message) == ("out", "olga: poison")


def test_tasks_of_an_ended_run_are_not_handed_out(journal: Journal) -> None:
    journal.add_task(KEY, spec=b"task", signature=b"s")
    journal.end_run("r", Cancelled(error="by alice"))
    assert journal.open_tasks("a") == []


def test_what_one_process_wrote_another_reads(journal: Journal, url: str) -> None:
    journal.add_event("r", RoundDone(round=1, sites=3, figures={}))
    other = open_journal(url)
    assert [(event.round, event.data) for event in other.events("r")] == [(1, {"sites": 3, "figures": {}})]
    assert other.events("r", after=other.events("r")[0].seq) == []
    with pytest.raises(NotFoundError, match="no run 'x'"):
        other.run("x")
    other.close()


def test_runs_come_in_pages_the_newest_first(journal: Journal) -> None:
    for number in range(7):
        journal.add_run(f"r{number}", token=f"t{number}", owner="ann" if number % 2 else "bob", spec=b"{}")
    first = journal.page(limit=3)
    assert [row.id for row in first] == ["r6", "r5", "r4"]
    assert [row.id for row in journal.page(limit=9, before="r4")] == ["r3", "r2", "r1", "r0", "r"]
    assert [row.id for row in journal.page(limit=9, before="r5", owner="ann")] == ["r3", "r1"]
    for name in ("version:0", "version:1", "plug_in:1"):
        journal.add_step("r1", name, {})
    assert journal.rounds_done(["r0", "r1"]) == {"r1": 1}
    with pytest.raises(NotFoundError):
        journal.page(limit=1, before="nothing")


@pytest.mark.parametrize("damage", ["text", "truncated", "garbled"])
def test_a_damaged_journal_is_one_sentence_that_names_it(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "journal.db"
    journal = open_journal(f"sqlite://{file}")
    for number in range(9):
        journal.add_run(f"r{number}", token=f"t{number}", owner="alice", spec=b"spec" * 3000)
    journal.close()
    content = file.read_bytes()
    half = len(content) // 2
    garbled = content[:4096] + b"\xff" * (len(content) - 4096)
    file.write_bytes({"text": b"not a journal" * 999, "truncated": content[:half], "garbled": garbled}[damage])
    with pytest.raises(MismatchError, match=f"{file}: the journal is damaged .*put a backup in its place"):
        open_journal(f"sqlite://{file}").check()


def test_what_hinders_the_journal_is_a_sentence(tmp_path: Path) -> None:
    journal = open_journal(f"sqlite://{tmp_path}/journal.db")

    def full(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA max_page_count=1")

    sqlalchemy.event.listen(journal._engine, "connect", full)
    journal.close()
    with pytest.raises(Unwritable, match="journal.db: the disk is full; free some space"):
        journal.add_run("big", token="big", owner="alice", spec=b"x" * 1_000_000)
    with pytest.raises(Unwritable, match="missing/journal.db: it cannot be opened"):
        open_journal(f"sqlite://{tmp_path}/missing/journal.db")


def test_an_older_journal_gets_the_columns_that_it_lacks(url: str) -> None:
    journal = open_journal(url)
    with journal._write() as connection:
        for column in ("note", "name", "rounds"):
            connection.execute(sqlalchemy.text(f"ALTER TABLE runs DROP COLUMN {column}"))
        connection.execute(sqlalchemy.text("ALTER TABLE tasks DROP COLUMN norm"))
        for index in ("runs_newest", "tasks_by_state"):
            connection.execute(sqlalchemy.text(f"DROP INDEX IF EXISTS {index}"))
        add = sqlalchemy.text("INSERT INTO runs (id, state, spec) VALUES (:id, 'queued', :spec)")
        specs = {"old": b'{"name": "old one", "rounds": 3}', "odd": b"\xff[]"}
        connection.execute(add, [{"id": name, "spec": spec} for name, spec in specs.items()])
        add = sqlalchemy.text("INSERT INTO tasks (run, round, site, attempt, state) VALUES ('old', 0, 'a', 0, 'taken')")
        connection.execute(add)
    journal.close()
    journal = open_journal(url)
    assert [(run.note, run.name, run.rounds) for run in map(journal.run, ("old", "odd"))] == [
        ("", "old one", 3),
        ("", "", 1),
    ]
    task = KEY._replace(run="old")
    assert journal.task(task).norm is None, "not known of what was accepted before"
    assert journal.set_task(task, state="uploaded", norm=0.1) and journal.task(task).norm == 0.1
    inspector = sqlalchemy.inspect(journal._engine)
    indices = {index["name"] for table in ("runs", "tasks") for index in inspector.get_indexes(table)}
    assert {"runs_newest", "tasks_by_state"} <= indices
    journal.close()


def test_what_the_fleet_asks_for_is_looked_up_and_not_searched_for(tmp_path: Path) -> None:
    journal, plans = open_journal(f"sqlite://{tmp_path}/journal.db"), []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE")):
            plan = connection.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(row[3] for row in plan)

    journal.add_run("r", token="t", owner="alice", spec=b"{}")
    journal.add_task(KEY, spec=b"task", signature=b"s")
    sqlalchemy.event.listen(journal._engine, "before_cursor_execute", explain)
    journal.next_tasks(["a", "b"])
    journal.offered()
    journal.set_task(KEY, state="training")
    journal.events("r", after=3)
    journal.page(limit=3, owner="alice")
    journal.page(limit=3)
    journal.rounds_done(["r"])
    journal.publications("sha256:0")
    assert len(plans) >= 9 and not [plan for plan in plans if plan.startswith("SCAN") and "INDEX" not in plan], plans
    assert not [plan for plan in plans if "ORDER BY" in plan and "tasks" in plan]


def test_each_site_is_given_the_task_of_the_oldest_run_and_many_tasks_change_at_once(journal: Journal) -> None:
    journal.add_run("r2", token="t2", owner="alice", spec=b"spec")
    keys = [Key(run, 0, site, 0) for run in ("r2", "r") for site in ("a", "b")]
    journal.add_tasks((key, f"{key.run}-{key.site}".encode(), b"s") for key in keys)
    journal.add_tasks([])
    assert [task and task.spec for task in journal.next_tasks(["b", "c", "a"])] == [b"r-b", None, b"r-a"]
    assert journal.set_task(keys[2], state="uploaded")
    moves = [Move(key, {"state": "taken"}, SiteState(round=1, site=key.site, state="taken")) for key in keys]
    assert journal.move_tasks(moves) == [True, True, False, True]
    assert [(event.site, event.round, event.data["state"]) for event in journal.events("r")] == [("b", 1, "taken")]
    assert [event.site for event in journal.events("r2")] == ["a", "b"] and journal.offered() == set()
