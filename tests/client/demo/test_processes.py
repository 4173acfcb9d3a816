"""An interrupt of the demo at any moment; its children are stand-ins that hold out as long as they can."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from offsite.client.demo.processes import Processes

STUBBORN = """
import json, signal, subprocess, sys, time

signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
if "parent" in sys.argv:
    for apart in (False, True):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=apart)
print(json.dumps({"event": "ready"}), flush=True)
for step in range(6000):
    print(json.dumps({"event": "step", "step": step}), flush=True)
    time.sleep(0.1)
"""
DEMO = """
import sys
from pathlib import Path
from offsite.client.demo import processes

processes.GRACE_S = 0.5
with processes.Processes(Path("logs")) as children:
    for name in ("polite", "deaf", "parent"):
        children.start(name, name, module="stubborn")
        print("started", flush=True)
    for name in ("polite", "deaf", "parent"):
        children.wait_for(name, "ready")
    print("ready", flush=True)
    for line in children.follow("parent"):
        print("step", flush=True)
"""


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    command = [sys.executable, "-c", DEMO]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        yield running
        running.kill()


def family(running: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(running.pid).children(recursive=True)


@pytest.mark.parametrize("moment", ["started", "ready", "step"])
@pytest.mark.parametrize("signals", [1, 2], ids=["once", "twice"])
def test_an_interrupt_leaves_nothing_behind(demo: subprocess.Popen[str], moment: str, signals: int) -> None:
    assert demo.stdout is not None and any(moment in line for line in demo.stdout)
    children = family(demo)
    assert children
    for _ in range(signals):
        demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == -signal.SIGINT and errors.strip().endswith("KeyboardInterrupt")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


class Unlucky:
    """A lock that is taken just as a Ctrl-C comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.release, self.locked = self._lock.release, self._lock.locked

    def acquire(self, blocking: bool = True) -> bool:
        taken = self._lock.acquire(blocking)
        signal.raise_signal(signal.SIGINT)
        return taken


def test_an_interrupt_while_a_child_is_looked_at_keeps_nobody_waiting(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("child", "-h", module="json.tool")
        lock = processes._children["child"]._waitpid_lock = Unlucky()  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            processes.check("child")
        assert not lock.locked()
        processes._children["child"]._waitpid_lock = threading.Lock()  # type: ignore[attr-defined]
