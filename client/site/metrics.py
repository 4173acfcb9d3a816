"""The metrics of a site's agent, for Prometheus. They hold no path, no text and no loss; the one name is the run's."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from offsite.client.site.meter import Meter
from offsite.protos.addresses import Address
from offsite.protos.telemetry.exposition import Exposition

STATES = ("waiting", "awaiting_approval", "downloading", "loading", "training", "uploading")
OUTCOMES = ("uploaded", "measured", "refused", "failed", "stopped")
SILENT_S = 90.0  # a coordinator that is there answers a poll within 20 s


class Metrics(Meter):
    """Counts what an agent does."""

    def __init__(self, address: Address) -> None:
        """Listen for who asks; raises ResourceError."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._bytes = Counter("offsite_site_bytes", "Bytes of files, by direction.", ["direction"], registry=registry)
        self._tasks = Counter("offsite_site_tasks", "Tasks that are over, by outcome.", ["outcome"], registry=registry)
        self._trained = Counter("offsite_site_steps", "Optimiser steps that were done.", registry=registry)
        self._round = Gauge("offsite_site_round", "Of the task at hand, from one; 0: none.", registry=registry)
        self._step = Gauge("offsite_site_step", "Of the task at hand.", registry=registry)
        self._of = Gauge("offsite_site_step_of", "Steps of the task at hand.", registry=registry)
        for direction in ("down", "up"):
            self._bytes.labels(direction)
        for outcome in OUTCOMES:
            self._tasks.labels(outcome)
        self._lock = threading.Lock()
        self._state, self._run, self._met_at = "waiting", "", float("-inf")
        registry.register(self)
        self._exposition = Exposition(address, registry, alive=lambda: "", ready=self._silent)
        self.address = self._exposition.address

    def state(self, name: str) -> None:
        """Note what the agent is at."""
        self._state = name

    def received(self, size: int) -> None:
        """Count bytes that were downloaded."""
        self._bytes.labels("down").inc(size)

    def met(self) -> None:
        """Note that the coordinator has answered."""
        self._met_at = time.monotonic()

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Count what the agent says."""
        if kind == "task":
            self._run = data["run"]
            self._round.set(data["round"])
            self._step.set(0)
            self._of.set(data["steps"])
        elif kind == "step":
            self.met()
            self._trained.inc()
            self._step.set(data["step"])
        elif kind in OUTCOMES:
            self._tasks.labels(kind).inc()
            self._bytes.labels("up").inc(data.get("bytes", 0))
            self._state, self._run = "waiting", ""
            for gauge in (self._round, self._step, self._of):
                gauge.set(0)

    def _silent(self) -> str:
        return "the coordinator does not answer" if time.monotonic() - self._met_at > SILENT_S else ""

    def collect(self) -> Iterator[Metric]:
        """Yield what is looked at."""
        yield InfoMetricFamily("offsite_site", "This version.", value={"version": version("offsite")})
        yield GaugeMetricFamily("offsite_site_connected", "Whether the coordinator answers.", value=not self._silent())
        states = GaugeMetricFamily("offsite_site_state", "1 for what the agent is at.", labels=["state"])
        for state in STATES:
            states.add_metric([state], state == self._state)
        yield states
        if run := self._run:
            yield InfoMetricFamily("offsite_site_task", "The task at hand.", value={"run": run})
        memory = _memory_of_children()
        yield GaugeMetricFamily("offsite_site_trainer_memory_bytes", "Resident, of all its processes.", value=memory)


def _memory_of_children() -> int:
    """Return what the trainers, and what they are forked from, have resident; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    left, total = _children(os.getpid()), 0
    while left:
        pid = left.pop()
        left += _children(pid)
        with suppress(OSError):  # it has ended
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def _children(pid: int) -> list[int]:
    pids = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            pids += [int(child) for child in task.read_text().split()]
    return pids
