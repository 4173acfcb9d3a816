"""The process that a site's trainers are forked from: ``python -m offsite.client.site.forkserver SOCKET ENGINE``.

A trainer ends with its task, so that its memory is free and a kill is clean; what it imports takes seconds, as long as
many a round's training. So one process imports it once, and a trainer begins as a copy of that process. A copy is sound
only of a process that has one thread, has computed no tensor and has not touched a GPU: this one imports and forks, and
does nothing else.

A request is a JSON object {"job": path, "environment": {...}} with four file descriptors: the trainer's standard input,
output and error, and a pipe on which the server tells the trainer's process id and, once it has ended, its exit code as
`subprocess` counts them, each in a line. The server ends when the other end of its socket (`forks.py`) is closed.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from offsite.client.site import trainer, training

LENGTH = 1 << 16  # of a request


def main(control: socket.socket, engine: str) -> None:
    """Import, then fork whenever that is asked for."""
    training.preload(engine)
    gc.collect()
    gc.freeze()  # a collection in a copy would write to, and so copy, all that is shared
    wakeup, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}  # process id -> the pipe to tell of it
    watched: list[Any] = [control, wakeup]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if wakeup in ready:
            os.read(wakeup, LENGTH)
            _bury(children)
        if control in ready:
            message, files, _, _ = socket.recv_fds(control, LENGTH, 4)
            if not message:
                return
            *standard, telling = files
            if not (pid := os.fork()):
                for file in (control.fileno(), wakeup, waking, telling, *children.values()):
                    os.close(file)
                _become_trainer(json.loads(message), standard)
            for file in standard:
                os.close(file)
            children[pid] = telling
            _tell(telling, pid)


def _bury(children: dict[int, int]) -> None:
    """Tell of all children that have ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        telling = children.pop(pid)
        _tell(telling, os.waitstatus_to_exitcode(status))
        os.close(telling)


def _tell(telling: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(telling, f"{number}\n".encode())


def _become_trainer(request: dict[str, Any], standard: list[int]) -> None:
    """Do a job in this process, which is a fresh copy of the server, and end it."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, file in enumerate(standard):
            os.dup2(file, target)
            os.close(file)
        os.environ.update(request["environment"])
        code = trainer.main(Path(request["job"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # threads of a collective that another rank never enters would hold the process


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
