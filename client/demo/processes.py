"""Child processes of the demo, none of which outlives it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from offsite.protos.errors import KINDS, OffsiteError, RunError

GRACE_S = 15.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold interrupts back, which come in the main thread.

    Until a child that begins to run is also on the list of those to end, and while one is looked at: an interrupt could
    leave Popen's lock taken, and whoever waits for that child would wait forever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous = {one: signal.signal(one, lambda number, _: came.append(number)) for one in INTERRUPTS}
    try:
        yield
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
    for number in came:
        signal.raise_signal(number)


class Processes:
    """Children in sessions of their own, so that a Ctrl-C reaches only the demo and the demo ends them in order."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self, name: str, *arguments: str, module: str = "offsite.client", environment: dict[str, str] | None = None
    ) -> None:
        """Run `python -m MODULE ARGUMENTS`; its output goes to `<logs>/<name>.log`."""
        with self._log(name).open("wb") as log, _undisturbed():
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def wait_for(self, name: str, event: str) -> dict[str, Any]:
        """Return the first JSON line of a child's log with this event; raises the child's error if it ends before."""
        return next(line for line in self.follow(name) if line["event"] == event)

    def follow(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the JSON lines of a child's log as they come, without end; raises the child's error when it has one."""
        with self._log(name).open(encoding="utf-8", errors="replace") as log:
            rest = ""
            while True:
                ended = self._code(name) is not None  # before reading: what it said last is not missed
                *lines, rest = (rest + log.read()).split("\n")
                yield from (json.loads(line) for line in lines if line.startswith("{") and line.endswith("}"))
                if ended:
                    self.check(name)
                    raise RunError(f"{name} ended before its time; its log is {self._log(name)}")
                time.sleep(0.05)

    def check(self, *names: str) -> None:
        """Raise an error with a child's last words if it has ended in failure."""
        for name in names or tuple(self._children):
            if code := self._code(name):
                words = self._log(name).read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                kind = next((kind for kind in KINDS if kind.exit_code == code), OffsiteError)
                raise kind(
                    f"{name} ended with exit code {code}: {words[0].removeprefix('offsite: ')} (log: {self._log(name)})"
                )

    def _code(self, name: str) -> int | None:
        """The exit code of a child, or None while it runs."""
        with _undisturbed():
            return self._children[name].poll()

    def stop(self) -> None:
        """End all children: politely, then with force, with everything they started."""
        # A second Ctrl-C must not leave half of them.
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
        try:
            family = [one for child in self._children.values() for one in _descendants(child.pid)]
            for child in self._children.values():
                if child.poll() is None:
                    child.terminate()
            deadline = time.monotonic() + GRACE_S
            for child in self._children.values():
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=max(0.1, deadline - time.monotonic()))
                family += _descendants(child.pid)
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            # Ray's own are in other groups, and some look for what is gone for a minute before they end.
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, timeout=GRACE_S)
        finally:
            self._children.clear()
            for number, handler in previous.items():
                signal.signal(number, handler)


def _descendants(process: int) -> list[psutil.Process]:
    """Return what a process has started, and what that has."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).children(recursive=True)
    return []
