"""Steps in processes of their own: what comes back, and what does not."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.node import Node
from offsite.coordinator.runs import forking
from offsite.coordinator.runs.steps import process
from offsite.coordinator.runs.supervisor import Lost
from offsite.coordinator.store import Unusable
from offsite.protos.documents import to_json
from offsite.protos.errors import ResourceError
from offsite.protos.processes.forks import ForkServer
from offsite.protos.spec import RunSpec

WORK = """
import json, os, time

def preload():
    pass

def main(path):
    job = json.loads(path.read_bytes())
    if job["step"] == "killed":
        os.kill(os.getpid(), 9)
    elif job["step"] in ("full", "away"):
        fault = {"status": "RESOURCE_EXHAUSTED", "reason": "FAULT_DISK", "message": "the disk is full"}
        print(json.dumps({"error": fault | {"unusable": job["step"] == "away"}}), flush=True)
    else:
        print(json.dumps({"result": f"{job['step']} {job['order']} {job['threads']}"}), flush=True)
    return 0
"""


@pytest.fixture
def server(stand: Any, tmp_path: Path) -> Iterator[ForkServer]:
    """What processes that only look like steps are forked from, at once."""
    (tmp_path / "looks.py").write_text(WORK)
    paths = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    made = ForkServer("looks", environment=paths, log=tmp_path / "log", address=forking.address(stand.home.root))
    made.start()
    yield made
    made.close()


@pytest.fixture
def perform(server: ForkServer, stand: Any) -> Any:
    """Steps done by such processes."""
    return lambda step: forking.perform(3, stand.home.node, step, b"{}", b"order", log={})


def test_a_step_gives_its_result_or_raises_its_own_error_and_leaves_nothing(perform: Any, stand: Any) -> None:
    assert perform("build") == b"build order 3"
    with pytest.raises(Unusable):
        perform("away")
    with pytest.raises(ResourceError, match="^the disk is full$") as error:
        perform("full")
    assert not isinstance(error.value, Unusable)
    assert error.value.reason == "FAULT_DISK" and not list(stand.home.node.scratch.iterdir())


def test_a_step_that_is_killed_is_lost_and_so_is_one_that_nobody_begins(perform: Any, tmp_path: Path) -> None:
    with pytest.raises(Lost, match="step killed: its process ended with exit code -9"):
        perform("killed")
    with pytest.raises(Lost, match="step build: what it is forked from has ended"):
        forking.perform(1, Node(tmp_path / "another", "file:///nowhere"), "build", b"{}", b"{}", log={})


def test_a_step_that_nothing_is_forked_for_says_what_that_said_last(stand: Any) -> None:
    node = stand.home.node
    (node.root / f"steps-{socket.gethostname()}.log").write_text(
        "Traceback\nModuleNotFoundError: No module named 'x'\n"
    )
    with pytest.raises(Lost, match=r"has ended: ModuleNotFoundError: No module named 'x' \(see .*/steps-"):
        forking.perform(1, node, "build", b"{}", b"{}", log={})


def test_steps_go_on_though_somebody_swept_the_address_away(perform: Any, server: ForkServer) -> None:
    assert server.address is not None
    server.address.unlink()
    with pytest.raises(Lost, match="has ended"):
        perform("build")
    server.start()
    assert perform("build") == b"build order 3"


def test_a_fault_of_ours_comes_back_in_words_and_the_log_says_of_what_step(
    stand: Any, capsys: pytest.CaptureFixture[str], logging_untouched: None
) -> None:
    spec = to_json(RunSpec(model="m")).decode()
    subject = {"run": "r", "round": 2, "step": "aggregate"}
    log = {"form": "json", "about": subject}
    job = {"threads": torch.get_num_threads(), "log": log, "step": "none", "order": "{}", "spec": spec}
    where = {"root": str(stand.home.root), "blobs": stand.home.node.url}
    fault = {"status": "INTERNAL", "reason": "", "message": "internal error: KeyError: 'none'"}
    assert process.outcome(job | where) == {"error": fault | {"unusable": False}}
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["info", "error"] and all(
        line.items() >= subject.items() for line in lines
    )
    assert lines[1]["fault"]["kind"] == "KeyError"
