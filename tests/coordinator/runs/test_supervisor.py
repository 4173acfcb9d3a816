"""The supervisor alone, with steps that a test stands for: what ends a run, and what is asked for once more."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.runs.supervisor import TRIES, Lost, Supervisor
from offsite.coordinator.store.journal import Journal, Key
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json
from offsite.protos.security.pki import Authority
from offsite.protos.spec import RunSpec, UpdateMetrics

DIGEST = digest_bytes(b"anything")
FIRST = {
    "base": {"digest": DIGEST},
    "bundle": {"layers": [], "bytes": 0, "disclosed": 0.0},
    "broadcast": {"ward": {"digest": DIGEST, "size": 1}},
    "learning_rate": 0.01,
    "computed": "fp32",
    "manifest": DIGEST,
    "manifest_size": 1,
    "method_hash": DIGEST,
    "residual": {},
    "recovery": None,
    "exact": None,
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    identity = Authority.create(tmp_path / "pki").issue("coordinator", "coordinator")
    return Home(tmp_path / "home", identity).prepare()


@pytest.fixture
def journal(home: Home) -> Journal:
    journal = home.journal()
    journal.add_run("r", token="t", owner="alice", spec=to_json(RunSpec(model="m")))
    journal.begin_run("r", ["ward"])
    return journal


def test_a_step_that_ends_its_process_again_and_again_ends_the_run(home: Home, journal: Journal) -> None:
    def killed(*arguments: Any) -> dict[str, Any]:
        raise Lost

    for _ in range(TRIES):
        assert journal.run("r").state == "running"
        with pytest.raises(Lost):
            Supervisor(home, "r", perform=killed).run()
    Supervisor(home, "r", perform=killed).run()
    run = journal.run("r")
    assert run.state == "failed" and f"step version:0 was begun {TRIES} times" in run.error and "memory" in run.error


def test_an_update_that_rots_is_asked_for_once_more_and_its_file_is_mended(home: Home, journal: Journal) -> None:
    asked: list[dict[str, Any]] = []

    def perform(step: str, root: str, identity: str, spec: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
        asked.append(arguments)
        status = {"status": "ABORTED", "message": "far enough"}
        return FIRST if step == "build" else {"error": status}

    def upload(attempt: int, content: bytes) -> None:
        file = home.scratch / "update"
        file.write_bytes(content)
        digest, _ = home.blobs().take(file)
        if attempt == 0:
            (home.root / "blobs" / digest[7:9] / digest[9:]).write_bytes(b"Update")
        metrics = UpdateMetrics(examples=3, tokens=1, loss=1.0, engine="plain")
        values = {"state": "uploaded", "update": digest, "metrics": to_json(metrics).decode()}
        assert journal.set_task(Key("r", 0, "ward", attempt), **values)

    worker = threading.Thread(target=Supervisor(home, "r", perform=perform).run)
    worker.start()
    for attempt in (0, 1):
        _until(lambda attempt=attempt: len(journal.tasks("r", 0)) == attempt + 1)
        upload(attempt, b"update")
    worker.join()
    digest = digest_bytes(b"update")
    assert journal.run("r").error == "far enough"
    assert asked[-1]["updates"] == [{"site": "ward", "digest": digest, "examples": 3}]
    assert home.blobs().path(digest).read_bytes() == b"update"
    lost = journal.task(Key("r", 0, "ward", 0))
    assert lost.state == "failed" and "was lost at the coordinator" in lost.message and digest[9:] in lost.message


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
