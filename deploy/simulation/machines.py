"""The other machines of a Ray cluster: their workers join a pool as they come, and leave it as they are lost.

Only a child process speaks to Ray (`lending.py`), so that whatever becomes of the cluster, the simulation goes on with
what it has. To this process a worker elsewhere is a line as those to its own.
"""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from offsite.coordinator.cluster.admission import admitted
from offsite.coordinator.cluster.looking import inside
from offsite.deploy.simulation.pool import Line, Pool
from offsite.protos.documents import to_json
from offsite.protos.errors import InputError

CLOSE_S = 20.0
Note = Callable[[str], object]


def admission(address: str, token: Path | None) -> dict[str, str]:
    """Return the environment that lets a process into a cluster, once it is clear that this machine is one of it.

    Raises InputError, UnreachableError, IdentityError or MismatchError, within ten seconds.
    """
    if token and not address:
        raise InputError("ray_token: of which cluster? give ray_address, too")
    environment = admitted(token)
    if address:
        inside(address, environment)
    return environment


class Machines:
    """What a cluster lends to a pool, from `with` to its end."""

    def __init__(self, address: str, environment: Mapping[str, str], pool: Pool, note: Note) -> None:
        """Take the address of its head, what lets a process in, and who is told in a sentence what comes and goes."""
        self._address, self._environment, self._pool, self._note = address, environment, pool, note
        self._folder = Path(pool.setup.spool)
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        """Begin to ask them; they come when they are ready."""
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(TemporaryDirectory(prefix="offsite-"))) / "machines"
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            stack.callback(listener.shutdown, socket.SHUT_RDWR)  # or who accepts would wait on
            listener.bind(str(place))
            listener.listen()
            job = self._folder / "machines.json"
            job.write_bytes(to_json(replace(self._pool.setup, socket=str(place))))
            log = stack.enter_context((self._folder / "machines.log").open("wb"))
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "offsite.deploy.simulation.lending", self._address, str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(self._environment),
                start_new_session=True,  # Ctrl-C is this process's, which then closes its stdin
            )
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            threading.Thread(target=self._hear, daemon=True).start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        self._closing.set()
        assert self._child.stdin is not None, "a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._stack.close()

    def _accept(self, listener: socket.socket) -> None:
        """Have each worker that comes join the pool."""
        with contextlib.suppress(OSError):  # once it is closed
            while True:
                connection, _ = listener.accept()
                with connection:
                    self._pool.join(Line(connection.makefile("rwb")))

    def _hear(self) -> None:
        """Hand on what the child says, a line each."""
        assert self._child.stdout is not None, "a pipe"
        with self._child.stdout as lines:
            for line in lines:
                self._note(line.rstrip("\n"))
        if not self._closing.is_set():
            log = self._folder / "machines.log"
            self._note(
                f"the Ray cluster at {self._address} is lost (see {log}); the simulation goes on, on this machine alone"
            )
