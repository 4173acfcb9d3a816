"""What is collected: never what a live run or a kept, published file needs; the rest goes, and that is said."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.retention import DAY_S, Retention, collect
from offsite.coordinator.runs.grant import Input
from offsite.coordinator.runs.steps.results import GATHER, Inputs
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.gateways import mark
from offsite.coordinator.store.journal import Journal, Key
from offsite.protos.documents import to_plain
from offsite.protos.events import Cancelled, Completed, RoundDone, SiteState
from offsite.protos.spec import FileEntry

WORKED_WITH = ("input", "manifest", "layer", "start", "update")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", tmp_path / "kit").prepare()


def store(home: Home, content: str, *, age_s: float = 2 * DAY_S) -> str:
    file = home.node.scratch / "file"
    file.write_text(content)
    digest, _ = home.blobs().take(file)
    then = time.time() - age_s
    os.utime(home.blobs().path(digest), (then, then))
    return digest


def make_run(
    home: Home, journal: Journal, name: str, *, ended_days_ago: float | None, listed: bool = True
) -> dict[str, str]:
    """A run with one file of every sort; returns their digests. Its journal lists a bundle's files, or did not yet."""
    journal.add_run(name, token=name, owner="alice", spec=b"{}")
    layer = store(home, f"layer {name}")
    files = {"layer": layer, "manifest": store(home, json.dumps({"files": [{"digest": layer}], "of": name}))}
    files |= {kind: store(home, f"{kind} {name}") for kind in ("input", "start", "update", "published")}
    given = Input(source="/model", files=(FileEntry(path="config.json", digest=files["input"], size=1),))
    journal.add_step(name, GATHER.name, to_plain(Inputs(places={"model": given})))
    built: dict[str, Any] = {"manifest": files["manifest"], "broadcast": {"ward": {"digest": files["start"]}}}
    if listed:
        built["bundle"] = {"files": [{"path": "layer", "digest": layer, "size": 1}]}
    journal.add_step(name, "version:0", built)
    journal.add_task(Key(name, 0, "ward", 0), spec=b"{}", signature=b"s")
    journal.set_task(Key(name, 0, "ward", 0), state="uploaded", update=files["update"])
    if ended_days_ago is not None:
        published = {"adapter": Stored(digest=files["published"], size=1)}
        journal.end_run(name, Completed(), report="{}", published=published)
        with journal._write() as connection:
            then = time.time() - ended_days_ago * DAY_S
            connection.exec_driver_sql("UPDATE runs SET finished_at = ? WHERE id = ?", (then, name))
    return files


def left(home: Home, files: dict[str, str]) -> set[str]:
    return {kind for kind, digest in files.items() if digest in home.blobs()}


def test_what_a_run_worked_with_goes_after_a_week_and_what_it_published_when_the_policy_says(home: Home) -> None:
    journal = home.journal()
    old = make_run(home, journal, "old", ended_days_ago=30)
    new = make_run(home, journal, "new", ended_days_ago=1)
    orphan = {"orphan": store(home, "orphan")}
    would = collect(home, Retention(), dry_run=True)
    assert left(home, old) == old.keys() and left(home, orphan)
    did = collect(home, Retention())
    assert did == would and (did.files, did.runs) == (len(WORKED_WITH) + 1, ())
    assert left(home, old) == {"published"} and left(home, new) == new.keys() and not left(home, orphan)

    assert collect(home, Retention(keep_days=7)).runs == ("old",)
    assert left(home, old) == set() and left(home, new) == new.keys()
    assert journal.artifacts("old") == [] and journal.publications(old["published"]) == []
    assert journal.run("old").report == "{}" and [event.kind for event in journal.events("old")] == ["completed"]
    assert collect(home, Retention(keep_runs=0)).runs == ("new",) and left(home, new) == set()
    assert collect(home, Retention(keep_runs=0)).files == 0


def test_a_live_run_keeps_all_it_has_and_what_it_may_have_just_stored(home: Home) -> None:
    journal = home.journal()
    ended = make_run(home, journal, "ended", ended_days_ago=30)
    live = make_run(home, journal, "live", ended_days_ago=None)
    young = {"young": store(home, "young", age_s=0)}
    store(home, "update ended", age_s=0)  # which the live run has just stored once more
    collect(home, Retention(keep_runs=0))
    assert left(home, live) == set(WORKED_WITH)
    assert left(home, young) == {"young"} and left(home, ended) == {"update"}


def test_the_version_that_a_waiting_run_goes_on_from_is_kept(home: Home) -> None:
    journal = home.journal()
    make_run(home, journal, "old", ended_days_ago=30)
    files = {"adapter": store(home, "adapter"), "sent": store(home, "sent"), "residual": store(home, "residual")}
    version = {
        "adapter": files["adapter"],
        "broadcast": {"r8": {"digest": files["sent"], "size": 4}},
        "state": {"residual.r8": files["residual"]},
    }
    journal.add_step("old", "version:1", {"version": version, "lineage": {"ward": {"update": store(home, "x")}}})
    continues = {"continues": {"run": "old", "round": 1, "rounds": 1}}
    journal.add_run("new", token="new", owner="alice", spec=b"{}", granted=continues)
    collect(home, Retention(keep_runs=0))
    assert left(home, files) == files.keys()
    journal.end_run("new", Cancelled(error="no more"))
    collect(home, Retention(keep_runs=0))
    assert left(home, files) == set()


@pytest.mark.parametrize("harm", ["rotten", "missing"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "older"])
def test_a_manifest_that_is_lost_is_named_and_costs_none_of_what_it_may_have_named(
    home: Home, harm: str, listed: bool, offsite: Any
) -> None:
    journal = home.journal()
    old = make_run(home, journal, "old", ended_days_ago=30)
    live = make_run(home, journal, "live", ended_days_ago=None, listed=listed)
    with journal._write() as connection:
        then = time.time() - 10 * DAY_S
        connection.exec_driver_sql("UPDATE runs SET submitted_at = ? WHERE id = 'live'", (then,))
    before, since = store(home, "before the run", age_s=12 * DAY_S), store(home, "since it was submitted")
    place = home.blobs().path(live["manifest"])
    place.write_text("rotten") if harm == "rotten" else place.unlink()
    gc = offsite("coordinator", "gc", "--home", str(home.root), "--format", "json")
    assert gc.returncode == 7 and f"run live: {home.root}" in gc.stderr and live["manifest"][9:11] in gc.stderr
    assert len(json.loads(gc.stdout)["lost"]) == 1 and left(home, live) >= {"layer", "start", "update"}
    assert before not in home.blobs() and (since in home.blobs()) is not listed
    assert left(home, old) == ({"published"} if listed else old.keys()), "the rest is collected"


def test_of_many_events_the_oldest_training_steps_go_and_no_other(home: Home) -> None:
    journal = home.journal()
    journal.add_run("r", token="r", owner="alice", spec=b"{}")
    journal.add_event("r", SiteState(round=1, site="ward", state="taken"))
    for step in range(6):
        journal.add_event("r", SiteState(round=1, site="ward", state="training", step=step))
    journal.add_event("r", RoundDone(round=1, sites=1, figures={}))
    assert collect(home, Retention(most_events=5)).events == 3
    told = [(event.kind, event.data.get("step")) for event in journal.events("r")]
    assert told == [("site", 0), ("site", 3), ("site", 4), ("site", 5), ("round", None)]


def test_what_tells_other_gateways_that_the_blobs_are_the_same_stays(home: Home) -> None:
    journal = home.journal()
    journal.announce("north", address="north:1", version="1", started_at=1.0, policy="p", owner="o")
    marks = {name: store(home, mark(name).decode()) for name in ("north", "gone")}
    collect(home, Retention())
    assert left(home, marks) == {"north"}
    journal.close()
