"""`offsite` in copies of a process that has imported the tensor libraries, which takes seconds.

The copies are processes of their own all the same, forked as trainers are (`offsite.protos.processes`). Others begin
as they do at a user's: those of `test_plugins.py`, `test_demo.py` and the tests of Ray, DeepSpeed and machines.
"""

import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from offsite.client.site.job import EngineSpec
from offsite.client.site.launch import _shared
from offsite.protos.processes.forks import Forked, ForkServer, fork

TRAINER = "offsite.client.site.trainer"  # by which processes that trainers are forked from are known


def preload(trainer: str) -> None:
    """Import what the steps of a coordinator and the trainers of an agent do."""
    from offsite.coordinator.runs.steps import process

    importlib.import_module(trainer).preload("plain")
    process.preload()
    assert "grpc" not in sys.modules, "it reads its environment when it is imported: each process has its own"


def main(path: Path) -> int:
    """Be `offsite ARGUMENTS`, whose trainers are forked from where this process was, or be a trainer."""
    from offsite.client import cli

    job = json.loads(path.read_text())
    if "arguments" not in job:
        return int(importlib.import_module(TRAINER).main(path))
    sys.argv = ["offsite", *job["arguments"]]
    if sys.argv[1] == "site":
        from offsite.client.site import agent

        agent.fork_server = partial(Trainers, Path(job["address"]))  # type: ignore[assignment]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
    return 0


class Trainers:
    """What an agent's trainers are forked from, seen from the agent: it is there already, and stays."""

    def __init__(self, address: Path, engine: EngineSpec, log: Path) -> None:
        self.log, self._address, self._engine = log, address, engine
        log.touch()

    def start(self) -> None:
        """Nothing is needed."""

    def fork(self, job: Path, environment: Mapping[str, str], **standard: int) -> Forked:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self._address))
            return fork(server, job, _shared(self._engine) | environment, **standard)

    def close(self) -> None:
        """Nothing is needed."""


class Copy:
    """A process that was forked, with what `subprocess.Popen` has for one that was started."""

    def __init__(self, forked: Forked) -> None:
        self._forked = forked
        self.poll = forked.poll
        while not (pid := forked.pid):  # it is imported for seconds, once
            assert forked.poll() is None, "what is forked from runs"
            time.sleep(0.01)
        self.pid = pid

    def wait(self, timeout: float | None = None) -> int:
        code = self._forked.wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("offsite", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        self._forked.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """What copies are forked from."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="offsite-warm-"))  # a socket's path must be short
        self._inherited = dict(os.environ)
        paths = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        log, self._address = self._folder / "log", self._folder / "server" / "socket"
        self._server = ForkServer("warm", [TRAINER], environment=own, log=log, address=self._address)
        self._server.start()
        self._input, self._leash = os.pipe()  # copies end when it ends
        self._jobs = itertools.count()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> Copy:
        """Begin `offsite ARGUMENTS`, with its output in an open file."""
        job = self._folder / f"{next(self._jobs)}.json"
        job.write_text(json.dumps({"arguments": arguments, "address": str(self._address)}))
        own = {name: value for name, value in environment.items() if self._inherited.get(name) != value}
        own.setdefault("PYTHONPATH", self._inherited.get("PYTHONPATH", ""))
        output = log.fileno()
        return Copy(self._server.fork(job, own, stdin=self._input, stdout=output, stderr=output))

    def close(self) -> None:
        self._server.close()
        os.close(self._leash)
        os.close(self._input)
        shutil.rmtree(self._folder)
