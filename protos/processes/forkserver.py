"""The process that others are forked from: ``python -m offsite.protos.processes.forkserver SOCKETS MODULE ...``.

A process that ends with its work gives all its memory back, and a kill is clean; but what it imports takes seconds. So
one process imports it once, and those that work begin as copies of it. A copy is sound only of a process that has one
thread, has computed no tensor and has not touched a GPU: this one imports and forks, and does nothing else.

MODULE is the work: its `preload` takes the arguments that follow and imports, its `main` does the job that a file
describes and returns an exit code. The end of standard input ends a process.

A request is a JSON object {"job": path, "environment": {...}} with four file descriptors: the process's standard input,
output and error, and a pipe on which the server tells the process's id and, once it has ended, its exit code as
`subprocess` counts them, each in a line. Requests come on the first socket, whose end ends the server (`forks.py` holds
the other one), and from whoever connects to the second, if there is one.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

LENGTH = 1 << 16  # of a request


class Work(Protocol):
    """What the processes are for: a module."""

    def preload(self, *arguments: str) -> None:
        """Import what a job needs: no thread, no tensor, no GPU."""

    def main(self, job: Path) -> int:
        """Do a job in a process of its own, and return the exit code."""


def main(sockets: Sequence[socket.socket], work: Work, arguments: Sequence[str]) -> None:
    """Import, then fork whenever that is asked for."""
    work.preload(*arguments)
    gc.collect()
    gc.freeze()  # a collection in a copy would write to, and so copy, all that is shared
    wakeup, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}  # process id -> the pipe to tell of it
    watched: list[Any] = [wakeup, *sockets]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if wakeup in ready:
            os.read(wakeup, LENGTH)
            _bury(children)
        for source in (one for one in sockets if one in ready):
            message, files = _request(source)
            if not message and source is sockets[0]:
                return
            if len(files) < 4:
                continue  # one who connected, and ended
            *standard, writer = files
            if not (pid := os.fork()):
                for file in (*(one.fileno() for one in sockets), wakeup, waking, writer, *children.values()):
                    os.close(file)
                _become(work, json.loads(message), standard)
            for file in standard:
                os.close(file)
            children[pid] = writer
            _tell(writer, pid)


def _request(source: socket.socket) -> tuple[bytes, list[int]]:
    """Read what is asked on a socket, or by one who connects to it; nothing if that has ended."""
    if not source.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return socket.recv_fds(source, LENGTH, 4)[:2]
    with source.accept()[0] as connection:
        return socket.recv_fds(connection, LENGTH, 4)[:2]


def _bury(children: dict[int, int]) -> None:
    """Tell of all children that have ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        writer = children.pop(pid)
        _tell(writer, os.waitstatus_to_exitcode(status))
        os.close(writer)


def _tell(writer: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(writer, f"{number}\n".encode())


def _become(work: Work, request: dict[str, Any], standard: list[int]) -> None:
    """Do a job in this process, which is a fresh copy of the server, and end it."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, file in enumerate(standard):
            os.dup2(file, target)
            os.close(file)
        threading.Thread(target=end_with_input, daemon=True).start()
        os.environ.update(request["environment"])
        code = work.main(Path(request["job"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # threads of a collective that another rank never enters would hold the process


def end_with_input() -> None:
    """End this process once its standard input ends, which whoever started it holds."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    numbers, module, *rest = sys.argv[1:]
    work: Any = importlib.import_module(module)
    main([socket.socket(fileno=int(number)) for number in numbers.split(",")], work, rest)
