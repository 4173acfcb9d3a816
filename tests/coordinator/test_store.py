"""The journal and the blobs: the first word stands, repeats change nothing, a full disk is said to be full."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from offsite.coordinator.store import blobs as blobs_module
from offsite.coordinator.store.blobs import Blobs, room
from offsite.coordinator.store.journal import Journal, Key
from offsite.protos.chunks import digest_bytes
from offsite.protos.errors import ConflictError, InputError, MismatchError, NotFoundError, ResourceError

KEY = Key(run="r", round=0, site="a", attempt=0)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "journal.db")
    made.add_run("r", token="t", owner="alice", spec=b"spec")
    return made


def test_a_submission_is_counted_once(journal: Journal) -> None:
    assert journal.add_run("r2", token="t", owner="alice", spec=b"spec").id == "r"
    with pytest.raises(ConflictError, match="for run r with another spec"):
        journal.add_run("r3", token="t", owner="alice", spec=b"other")
    assert [run.id for run in journal.runs()] == ["r"]


def test_a_run_ends_once(journal: Journal) -> None:
    journal.end_run("r", "cancelled", error="by alice")
    journal.end_run("r", "completed")
    journal.set_run("r", state="running")
    assert (journal.run("r").state, journal.run("r").error) == ("cancelled", "by alice")
    assert [event.kind for event in journal.events("r")] == ["cancelled"]


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


def test_tasks_of_an_ended_run_are_not_handed_out(journal: Journal) -> None:
    journal.add_task(KEY, spec=b"task", signature=b"s")
    journal.end_run("r", "cancelled")
    assert journal.open_tasks("a") == []


def test_what_one_process_wrote_another_reads(journal: Journal, tmp_path: Path) -> None:
    journal.add_event("r", "round", round=1, sites=3)
    other = Journal(tmp_path / "journal.db")
    assert [(event.round, event.data) for event in other.events("r")] == [(1, {"sites": 3})]
    assert other.events("r", after=other.events("r")[0].seq) == []
    with pytest.raises(NotFoundError, match="no run 'x'"):
        other.run("x")


def test_a_blob_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    for content in (b"one", b"one", b"two"):
        (tmp_path / "file").write_bytes(content)
        assert blobs.take(tmp_path / "file") == (digest_bytes(content), 3)
        assert not (tmp_path / "file").exists() and blobs.path(digest_bytes(content)).read_bytes() == content
    (tmp_path / "file").write_bytes(b"three")
    with pytest.raises(MismatchError, match="announced was"):
        blobs.take(tmp_path / "file", digest=digest_bytes(b"one"))
    assert digest_bytes(b"three") not in blobs and (tmp_path / "file").exists()


def test_only_a_digest_names_a_blob(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    with pytest.raises(InputError, match="is not a digest"):
        blobs.path("../journal.db")
    with pytest.raises(NotFoundError):
        blobs.path(digest_bytes(b"never seen"))


def test_a_full_disk_is_said_to_be_full_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100 << 20, 35 << 20, 65 << 20))
    assert blobs_module.shutil is shutil
    room(tmp_path, 1 << 19)
    with pytest.raises(ResourceError, match="65 MiB free, 74 MiB are needed") as caught:
        room(tmp_path, 10 << 20)
    assert caught.value.exit_code == 8


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
