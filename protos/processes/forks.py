"""The other end of the process that processes are forked from (`forkserver.py`). Imports no tensor library."""

import contextlib
import json
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from offsite.protos.errors import ResourceError

# What libraries read when they are imported, so that what imports them can be forked.
VARIABLES = {
    "OPENBLAS_NUM_THREADS": "1",  # it starts its threads when numpy is imported, and nothing here needs them
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # counting GPUs must not touch them before the fork
    "TOKENIZERS_PARALLELISM": "false",
}


class ForkServer:
    """Makes processes that do one work. The server is started when it is first needed, and again should it have ended.

    One that has an `address` does so for other processes of this account, too, which connect to it and `fork`.
    """

    def __init__(
        self,
        work: str,
        arguments: Sequence[str] = (),
        *,
        environment: Mapping[str, str],
        log: Path,
        address: Path | None = None,
    ) -> None:
        """Name the module of the work, what it preloads, and the file that the server's own output goes to.

        The folder of an address is made this account's alone; `start` raises ResourceError where it is another's.
        """
        self.log, self.address = log, address
        self._work, self._environment = [work, *arguments], environment
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the server unless it runs. It imports for seconds; what is asked of it meanwhile waits."""
        runs = self._process is not None and self._process.poll() is None
        if runs and (self.address is None or self.address.is_socket()):  # others may have swept what lies in /tmp
            return
        self.close()
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(_listener(self.address))] if self.address is not None else []
            self._socket, other = socket.socketpair()
            sockets.insert(0, stack.enter_context(other))
            numbers = [one.fileno() for one in sockets]
            self._process = subprocess.Popen(
                # -P: a file in the folder where this runs must not stand in for a library
                [sys.executable, "-P", "-m", "offsite.protos.processes.forkserver"]
                + [",".join(map(str, numbers)), *self._work],
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context(self.log.open("wb")),
                stderr=subprocess.STDOUT,
                env={**os.environ, **VARIABLES, **self._environment},
                pass_fds=numbers,
                start_new_session=True,  # an interrupt at a terminal is its owner's to handle
            )

    def fork(self, job: Path, environment: Mapping[str, str], *, stdin: int, stdout: int, stderr: int) -> "Forked":
        """Start a process; the descriptors remain the caller's to close."""
        self.start()
        assert self._process is not None and self._socket is not None
        return fork(self._socket, job, environment, stdin=stdin, stdout=stdout, stderr=stderr, ended=self._process.wait)

    def close(self) -> None:
        """End the server; processes that were forked go on."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.terminate()  # it may be importing
            self._process.wait()
            self._process = self._socket = None
        if self.address is not None:
            self.address.unlink(missing_ok=True)


def _listener(address: Path) -> socket.socket:
    """Listen in place of whoever did so before: a server that was killed leaves its address behind."""
    folder = address.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()  # where everybody may make a folder, it may be a trap that waits for us under this name
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        raise ResourceError(f"{folder}: it is not a folder of this account's own; look whose it is, and remove it")
    folder.chmod(0o700)
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    return listener


def fork(
    server: socket.socket,
    job: Path,
    environment: Mapping[str, str],
    *,
    stdin: int,
    stdout: int,
    stderr: int,
    ended: Callable[[], int] = lambda: 1,
) -> "Forked":
    """Ask a server for a process; `ended` is how the server ended, should it.

    The descriptors remain the caller's to close.
    """
    request = json.dumps({"job": str(job), "environment": dict(environment)}).encode()
    reader, writer = os.pipe()
    try:
        # A server that has just ended cannot take the request; the pipe, whose last end is closed then, says so.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(server, [request], [stdin, stdout, stderr, writer])
    finally:
        os.close(writer)
    return Forked(reader, ended)


class Forked:
    """A process that is the server's child and ours to follow, as one would a `subprocess.Popen`."""

    def __init__(self, reader: int, ended: Callable[[], int]) -> None:
        """Take the pipe on which the server tells of the process, and what waits for the server's end."""
        self._reader, self._ended = reader, ended
        self._words = b""
        self._code: int | None = None
        self.lost = False  # whether the server ended before this process, and how it does is not known
        self._lock = threading.Lock()
        os.set_blocking(reader, False)

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
                words = os.read(self._reader, 64)
                self._words += words
                if self._words.count(b"\n") == 2:
                    self._code = int(self._words.split()[1])
                elif not words:
                    self.lost, self._code = True, self._ended() or 1
                if self._code is not None:
                    os.close(self._reader)
        return self._code

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code, or None if it runs after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with contextlib.suppress(ValueError, OSError):  # closed meanwhile, as another thread has heard of the end
                if not select.select([self._reader], [], [], left)[0]:
                    return None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None and (pid := self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
