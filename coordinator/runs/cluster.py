"""Supervisors on Ray, kept at arm's length: a child process (`workers.py`) speaks to Ray for the coordinator.

So nothing of Ray's listens in the coordinator, writes into its output, or can end or silence it; when Ray or the child
dies, the coordinator says so, tries again until it can join or start one, and the journal supplies the state.
"""

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from offsite.coordinator.cluster.admission import admitted, made
from offsite.coordinator.cluster.looking import inside
from offsite.coordinator.home import Home
from offsite.coordinator.runs import forking
from offsite.coordinator.runs.shards import PART_BYTES
from offsite.protos.errors import OffsiteError, ResourceError, UnreachableError
from offsite.protos.telemetry.logs import Form

log = logging.getLogger(__name__)

JOIN_S = 10.0  # for joining a cluster, once Ray is imported
START_S = 240.0  # for importing Ray, and for starting it on a machine that is busy
SILENT_S = 60.0  # a child that is well says so every 2 s
AGAIN_S = 3.0  # between two tries to join
CLOSE_S = 15.0
ENDED = "ended"


class OnRay:
    """Supervisors as detached actors of a Ray cluster, or of one started for this process on loopback."""

    def __init__(
        self,
        home: Home,
        *,
        address: str | None = None,
        token: Path | None = None,
        threads: int = 0,
        part: int = PART_BYTES,
        log_form: Form = "text",
    ) -> None:
        """Name the cluster's address and the file of its token; without an address, one is started.

        `part` is how many bytes a part of a step has at least.
        """
        self._home, self._address, self._token, self._threads, self._part = home, address, token, threads, part
        self._log_form = log_form  # of what supervisors and steps log, into Ray's files
        self._where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        self._hope = "; the runs wait until it is started again" if address else "; it is started again"
        self._child: subprocess.Popen[bytes] | None = None
        self._words: queue.Queue[str] = queue.Queue()
        self._closing = threading.Event()
        self.fault = f"{self._where} has not started"

    def start(self) -> None:
        """Join the cluster or start one; raises OffsiteError where that cannot be."""
        self._join()
        threading.Thread(target=self._keep, daemon=True, name="ray").start()

    def supervise(self, run: str) -> None:
        """Let the child find or start the actor of a run; lost where there is no child, and asked again then."""
        child = self._child
        if child is not None and child.stdin is not None:
            try:
                child.stdin.write(f"{run}\n".encode())
                child.stdin.flush()
            except (OSError, ValueError):
                log.debug("run %s: no child", run)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._closing.set()
        self._words.put(ENDED)
        self._end()
        if not self._address:
            forking.address(self._home.root).unlink(missing_ok=True)  # Ray kills who listened there

    def _keep(self) -> None:
        """Listen to the child; join again when it has ended or is silent."""
        while not self._closing.is_set():
            try:
                while True:
                    self._hear(SILENT_S)
            except OffsiteError as error:
                self._say(error, self._hope)
            while not self._closing.wait(AGAIN_S):
                try:
                    self._join()
                    log.warning("%s is back; the runs go on", self._where)
                    break
                except OffsiteError as error:
                    self._say(error, "")

    def _say(self, error: OffsiteError, more: str) -> None:
        """Make a fault known, once."""
        if not self._closing.is_set() and str(error) != self.fault:
            self.fault = str(error)
            log.error("%s%s", error, more)

    def _join(self) -> None:
        self._end()
        environment = admitted(self._token)
        if self._address:
            inside(self._address, environment)
        else:
            # Read when Ray is imported: without the first it turns 127.0.0.1 into the machine's routable address. The
            # others keep its token out of the user's home, where it would be readable by everybody.
            environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
            environment |= {"RAY_AUTH_TOKEN_PATH": str(made(self._home.root / "ray-token"))}
            environment.pop("RAY_AUTH_TOKEN", None)
            environment.pop("RAY_ADDRESS", None)
        environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        log_file = self._home.root / "ray.log"
        if log_file.exists():
            log_file.replace(log_file.with_suffix(".log.1"))
        reading, writing = os.pipe()
        arguments = [str(self._home.root), str(self._home.identity), self._address or "", str(self._threads)]
        arguments += [str(self._part), self._log_form]
        try:
            with log_file.open("ab") as output:
                child = subprocess.Popen(
                    [sys.executable, "-m", "offsite.coordinator.runs.workers", *arguments, str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=(writing,),
                    start_new_session=True,  # Ctrl-C is the coordinator's, which then closes the child's stdin
                )
        finally:
            os.close(writing)
        self._child, self._words = child, queue.Queue()
        threading.Thread(target=_listen, args=(reading, self._words), daemon=True).start()
        if self._closing.is_set():
            self._words.put(ENDED)
        try:
            self._hear(START_S)  # "imported"
            self._hear(JOIN_S if self._address else START_S)  # "ready"
        except OffsiteError:
            self._end()
            raise
        self.fault = ""

    def _hear(self, seconds: float) -> None:
        """Wait for the child's next word; raises ResourceError or UnreachableError when it is not a good one."""
        try:
            word = self._words.get(timeout=seconds)
        except queue.Empty:
            raise UnreachableError(
                f"{self._where} does not answer for {seconds:.0f} s; look whether it is well (`ray status`)"
            ) from None
        if word == ENDED:
            raise UnreachableError(f"{self._where}: the process that speaks to it ended; see {self._home.root}/ray.log")
        if word.startswith("warning: "):
            log.warning("%s: %s", self._where, word.removeprefix("warning: "))
        if word.startswith("error: "):
            raise ResourceError(f"{self._where}: {word.removeprefix('error: ')}")

    def _end(self) -> None:
        """End the child, politely if it has joined: it takes with it what Ray started here."""
        child, self._child = self._child, None
        if child is None:
            return
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
        try:
            child.wait(timeout=0 if self.fault else CLOSE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _listen(reading: int, words: "queue.Queue[str]") -> None:
    """Hand on the child's lines, then that it ended."""
    with os.fdopen(reading) as lines:
        for line in lines:
            words.put(line.rstrip("\n"))
    words.put(ENDED)
