"""Starts a task's trainer processes and follows them. Imports no tensor library: the agent stays small."""

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.protos.documents import to_json
from offsite.protos.errors import InputError, OffsiteError, ResourceError, RunError, from_status
from offsite.protos.processes.forks import VARIABLES, Forked, ForkServer

POLL_S = 1.0  # how soon a process is missed that died without a word
LOG_TAIL = 4096  # bytes of a trainer's log that are kept when its task fails
GRACE_S = 5.0  # between asking a process to end and ending it


def fork_server(engine: EngineSpec, log: Path) -> ForkServer:
    """Return what trainers of an engine are forked from; `log` is for its own output."""
    return ForkServer("offsite.client.site.trainer", [engine.name], environment=_shared(engine), log=log)


def launch(job: TrainerJob, folder: Path, server: ForkServer) -> "Trainer":
    """Start one process per rank in a folder of the task's own, where each leaves its log.

    The site's own launcher starts them as it is told, and what it and they say is one log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = folder / "job.json"
    document.write_bytes(to_json(job))
    (folder / "rendezvous").unlink(missing_ok=True)  # of an attempt that was killed; the ranks would wait for it
    leash_read, leash = os.pipe()
    events, events_write = os.pipe()
    processes: list[Forked | Launched] = []
    logs = [folder / f"rank-{rank}.log" for rank in range(1 if job.engine.launcher else job.engine.processes)]
    try:
        for rank, path in enumerate(logs):
            with path.open("wb") as log:
                ends = {"stdin": leash_read, "stdout": events_write, "stderr": log.fileno()}
                processes.append(
                    Launched(job.engine, document, ends)
                    if job.engine.launcher
                    else server.fork(document, _own(folder, rank), **ends)
                )
    finally:
        os.close(leash_read)
        os.close(events_write)
    return Trainer(processes, logs if job.engine.launcher else [*logs, server.log], leash=leash, events=events)


class Launched(subprocess.Popen[bytes]):
    """The launcher of a site, followed as a forked process is. Trainers have its standard input, and end with it."""

    lost = False

    def __init__(self, engine: EngineSpec, job: Path, ends: Mapping[str, int]) -> None:
        """Start it; raises InputError where there is no such command."""
        command = [*shlex.split(engine.launcher), sys.executable, "-P", "-m", "offsite.client.site.trainer", str(job)]
        ours = {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}  # of one machine
        shared = {name: value for name, value in _shared(engine).items() if name not in ours}
        environment = {**os.environ, **VARIABLES, **shared, "TORCH_EXTENSIONS_DIR": str(job.with_name("extensions"))}
        try:
            super().__init__(command, env=environment, start_new_session=True, **ends)  # type: ignore[call-overload]
        except OSError as error:
            raise InputError(f"the launcher {engine.launcher!r} cannot be started: {error}") from None

    def wait(self, timeout: float | None = None) -> int | None:  # type: ignore[override]
        """Return the exit code, or None if it runs after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return super().wait(timeout)
        return None


def _shared(engine: EngineSpec) -> dict[str, str]:
    """Return what the libraries of an engine read, and whatever else all its trainers have in common."""
    variables = {
        "WORLD_SIZE": str(engine.processes),
        "LOCAL_WORLD_SIZE": str(engine.processes),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve the other processes
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


def _own(folder: Path, rank: int) -> dict[str, str]:
    """Return what is a rank's own; what all have in common is the server's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),  # a killed compilation's lock must not outlive the task
    }


class Trainer:
    """The processes of one task. They end when this process does, however it does: it holds their standard input."""

    def __init__(self, processes: "list[Forked | Launched]", logs: list[Path], *, leash: int, events: int) -> None:
        """Take running processes, their logs and the server's, and our ends of the pipes to input and from output."""
        self.processes, self._logs = processes, logs
        self._events = events
        self._leash: int | None = leash
        self._lock = threading.Lock()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what the trainer tells until it is done, and then nothing of it runs any more.

        Raises the trainer's own error, ResourceError if a process was killed, RunError if it ended without a word.
        """
        fault: OffsiteError | None = None
        try:
            for event in self._listen():
                if event["event"] == "error":
                    fault = from_status(event["status"], event["message"], reason=event.get("reason", ""))
                    break
                yield event
            self._wait(GRACE_S)
            codes = [process.poll() for process in self.processes]
        finally:
            stopped = self._leash is None
            self.stop()
        if stopped:
            raise RunError("the trainer was stopped")
        # A process that was killed could not tell; what the others tell is only that it is gone.
        if error := _killed(codes) or fault:
            raise error
        if any(codes):
            raise RunError(f"the trainer ended with exit codes {codes}\n{self._last_words()}")

    def _listen(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of all ranks; end when all have closed their output, or one has died and no more comes.

        Ranks whose server has died may go on and talk, but nobody would know how they ended.
        """
        with os.fdopen(self._events, "rb", buffering=0) as pipe:
            rest = b""
            while True:
                ready, _, _ = select.select([pipe], [], [], POLL_S)
                if ready:
                    data = pipe.read(1 << 16)
                    if not data:
                        return
                    *lines, rest = (rest + data).split(b"\n")
                    yield from map(json.loads, lines)
                if any(process.poll() and (process.lost or not ready) for process in self.processes):
                    return

    def stop(self) -> None:
        """End all processes and wait for them; may be called from any thread, and again."""
        with self._lock:
            if self._leash is None:
                return
            os.close(self._leash)
            self._leash = None
            for process in self.processes:
                process.send_signal(signal.SIGTERM)
            self._wait(GRACE_S)
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def _wait(self, seconds: float) -> None:
        """Wait until all processes have ended, or for so long."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.wait(max(0.0, deadline - time.monotonic()))

    def _last_words(self) -> str:
        """The end of the log of a process that failed; of the server's if that process left none."""
        failed = next(at for at, process in enumerate(self.processes) if process.poll())
        return "\n".join((last(self._logs[failed]) or last(self._logs[-1])).splitlines()[-5:])


def last(log: Path) -> str:
    """Return the end of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        return file.read().decode(errors="replace")


def _killed(codes: Sequence[int | None]) -> ResourceError | None:
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            return ResourceError(
                f"the trainer's process {rank} was killed by signal {-code}; the machine may be out of memory: "
                "use fewer processes, a higher zero_stage, or a smaller batch_size or max_length",
                reason="FAULT_KILLED",
            )
    return None
