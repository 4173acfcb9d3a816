"""The agent's end of the process that trainers are forked from (`forkserver.py`). Imports no tensor library."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from offsite.client.site.job import EngineSpec


class ForkServer:
    """Makes trainers of one engine. The server is started when it is first needed, and again should it have ended."""

    def __init__(self, engine: EngineSpec, log: Path) -> None:
        """Name the engine that is imported, and the file that the server's own output goes to."""
        self.log = log
        self._engine = engine
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the server unless it runs. It imports for seconds; what is asked of it meanwhile waits."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._socket, other = socket.socketpair()
        with other, self.log.open("wb") as log:
            self._process = subprocess.Popen(
                # -P: a file in the folder where the agent runs must not stand in for a library
                [sys.executable, "-P", "-m", "offsite.client.site.forkserver", str(other.fileno()), self._engine.name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _environment(self._engine),
                pass_fds=(other.fileno(),),
                start_new_session=True,  # an interrupt at the agent's terminal is the agent's to handle
            )

    def fork(self, job: Path, environment: Mapping[str, str], *, stdin: int, stdout: int, stderr: int) -> "Forked":
        """Start a trainer; the descriptors remain the caller's to close."""
        self.start()
        assert self._process is not None and self._socket is not None
        request = json.dumps({"job": str(job), "environment": dict(environment)}).encode()
        told, telling = os.pipe()
        try:
            # A server that has just ended cannot take the request; the pipe, whose last end is closed then, says so.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._socket, [request], [stdin, stdout, stderr, telling])
        finally:
            os.close(telling)
        return Forked(told, self._process)

    def close(self) -> None:
        """End the server; trainers go on."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.terminate()  # it may be importing
            self._process.wait()
            self._process = self._socket = None


def _environment(engine: EngineSpec) -> dict[str, str]:
    """Return what libraries read when they are imported, and whatever else all trainers of an engine have in common."""
    variables = {
        "WORLD_SIZE": str(engine.processes),
        "LOCAL_WORLD_SIZE": str(engine.processes),
        "OPENBLAS_NUM_THREADS": "1",  # it starts its threads when numpy is imported, and training does not use them
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # counting GPUs must not touch them before the fork
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve the other processes
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed earns one at every collective, each a line in the log
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it the sums of cuBLAS differ from run to run
    }
    if engine.threads:
        variables["OMP_NUM_THREADS"] = str(engine.threads)
    if engine.device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if sys.platform == "linux":  # the ranks talk within this machine, whatever its host name resolves to
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return variables


class Forked:
    """A process that is the server's child and ours to follow, as one would a `subprocess.Popen`."""

    def __init__(self, told: int, server: subprocess.Popen[bytes]) -> None:
        """Take the pipe on which the server tells of the process."""
        self._told, self._server = told, server
        self._words = b""
        self._code: int | None = None
        self.lost = False  # whether the server ended before this process, and how it does is not known
        self._lock = threading.Lock()
        os.set_blocking(told, False)

    @property
    def pid(self) -> int | None:
        """Its id, once it was forked."""
        self.poll()
        pid, end, _ = self._words.partition(b"\n")
        return int(pid) if end else None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; that of the server if it ended and can no longer tell."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while self._code is None:
                words = os.read(self._told, 64)
                self._words += words
                if self._words.count(b"\n") == 2:
                    self._code = int(self._words.split()[1])
                elif not words:
                    self.lost, self._code = True, self._server.wait() or 1
                if self._code is not None:
                    os.close(self._told)
        return self._code

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code, or None if it runs after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with contextlib.suppress(ValueError, OSError):  # closed meanwhile, as another thread has heard of the end
                if not select.select([self._told], [], [], left)[0]:
                    return None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None and (pid := self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
