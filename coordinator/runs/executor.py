"""Where supervisors run: one interface, two homes. This one is threads of the server's own process.

It serves tests and the smallest installs; `workers.py` is the same on Ray.
"""

import logging
import threading
from typing import Protocol

from offsite.coordinator.home import Home
from offsite.coordinator.runs.needs import Needs
from offsite.coordinator.runs.supervisor import Lost, Supervisor
from offsite.protos.errors import OffsiteError
from offsite.protos.telemetry.logs import about

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs supervisors."""

    @property
    def fault(self) -> str:
        """Why it cannot work now, in a sentence; empty while it can."""

    def start(self) -> None:
        """Get ready to work; raises OffsiteError. `close` from another thread ends it early."""

    def supervise(self, run: str) -> None:
        """Make sure a supervisor works on a run; calling it again changes nothing."""

    def close(self) -> None:
        """Let go of what was started here."""


class InProcess:
    """Supervisors as threads, steps in the thread that asks for them, one at a time.

    What a process is loading a model on or with, and the random state of its training, is the same for all its threads.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._threads: dict[str, threading.Thread] = {}
        self._lock, self._step = threading.Lock(), threading.Lock()
        self._closing = False
        self.fault = ""

    def start(self) -> None:
        """Nothing is needed."""

    def supervise(self, run: str) -> None:
        """Start a thread for a run that has none."""
        with self._lock:
            if run in self._threads and self._threads[run].is_alive():
                return
            self._threads[run] = threading.Thread(target=self._work, args=(run,), daemon=True, name=f"run-{run}")
            self._threads[run].start()

    def _work(self, run: str) -> None:
        with about(run=run):
            try:
                log.info("run %s: worked on", run)
                Supervisor(self._home, run, perform=self._perform).run()
                log.info("run %s: over", run)
            except Lost:
                log.info("run %s: left where it is", run)
            except OffsiteError as error:  # the journal's: it is full, or damaged
                log.error("run %s: left where it is: %s", run, error)

    def _perform(self, step: str, spec: bytes, order: bytes, _: Needs) -> bytes:
        from offsite.coordinator.runs.steps.performing import perform  # torch: only once there is work

        try:
            with self._step:
                return perform(self._home.node, step, spec, order)
        except Exception:
            if self._closing:  # libraries fail in odd ways while the interpreter ends; that is not the run's fault
                raise Lost from None
            raise

    def close(self) -> None:
        """Threads are daemons and hold no state: what they were at is taken up at the next start."""
        self._closing = True
