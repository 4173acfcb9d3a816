"""The supervisor alone, with steps that a test stands for: what ends a run, and what is asked for once more."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.bundles.manifests import describe
from offsite.coordinator.home import Home
from offsite.coordinator.runs.steps.orders import Aggregate, Update
from offsite.coordinator.runs.steps.results import Built
from offsite.coordinator.runs.supervisor import TRIES, Lost, Supervisor
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import Journal, Key
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import RunError
from offsite.protos.security.pki import Authority
from offsite.protos.spec import BaseRef, Choice, Manifest, RunSpec, UpdateMetrics

DIGEST = digest_bytes(b"anything")
BASE = BaseRef(name="m", digest=DIGEST, layers=1, parameters=1)
MANIFEST = Manifest(
    base=BASE,
    builders=(Choice(name="whole"),),
    layers=(0,),
    trainable=(0,),
    parameters=1,
    verbatim=1,
    lossy=0,
    files=(),
)
FIRST = Built(
    manifest=DIGEST,
    manifest_size=1,
    bundle=describe(MANIFEST),
    base=BASE,
    method_hash=DIGEST,
    broadcast={"ward": Stored(digest=DIGEST, size=1)},
    residual={},
    learning_rate=0.01,
    computed="fp32",
    recovery=None,
)


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
    def killed(*arguments: Any) -> bytes:
        raise Lost

    for _ in range(TRIES):
        assert journal.run("r").state == "running"
        with pytest.raises(Lost):
            Supervisor(home, "r", perform=killed).run()
    Supervisor(home, "r", perform=killed).run()
    run = journal.run("r")
    assert run.state == "failed" and f"step version:0 was begun {TRIES} times" in run.error and "memory" in run.error


def test_an_update_that_rots_is_asked_for_once_more_and_its_file_is_mended(home: Home, journal: Journal) -> None:
    asked: list[bytes] = []

    def perform(step: str, root: str, identity: str, spec: bytes, order: bytes) -> bytes:
        asked.append(order)
        if step != "build":
            raise RunError("far enough")
        return to_json(FIRST)

    def upload(attempt: int, content: bytes) -> None:
        file = home.scratch / "update"
        file.write_bytes(content)
        digest, _ = home.blobs().take(file)
        if attempt == 0:
            home.blobs().path(digest).write_bytes(b"Update")
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
    order = from_json(Aggregate, asked[-1], where="order")
    assert order.updates == (Update(site="ward", digest=digest, examples=3),)
    assert home.blobs().path(digest).read_bytes() == b"update"
    lost = journal.task(Key("r", 0, "ward", 0))
    assert lost.state == "failed" and "was lost at the coordinator" in lost.message and digest[9:] in lost.message


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
