"""The metrics of a gateway, for Prometheus. No label has a name of a person, site, run or file."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from offsite.coordinator.runs.rounds import PRESENT_S
from offsite.coordinator.service.meter import Gauged, Meter
from offsite.coordinator.store.journal import LIVE, OPEN
from offsite.protos.addresses import Address
from offsite.protos.errors import OffsiteError
from offsite.protos.figures import BASE_TUNED
from offsite.protos.telemetry.exposition import Exposition

BEAT_S = 0.5
STUCK_S = 30.0  # an event loop that was busy for so long does not live
FRESH_S = 2.0  # an answer about the stores holds for so long, however often is asked
ENDS = ("completed", "failed", "cancelled")
SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)
SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
STEPS = {"bundle": "realign", "attack": "attack", "publish": "publish", BASE_TUNED: "tune"}  # by name in the journal


class Metrics(Meter):
    """Counts what a gateway does, and looks at the rest when it is asked."""

    def __init__(self, address: Address) -> None:
        """Listen for who asks; raises ResourceError."""
        registry = CollectorRegistry()
        registry.register(self)  # the first that is asked: it looks for what the others count
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._bytes = Counter(
            "offsite_transferred_bytes", "Bytes of files, sent down or received up.", ["direction"], registry=registry
        )
        self._uploads = Counter(
            "offsite_uploads",
            "Uploads by outcome; of those refused, by kind.",
            ["outcome", "reason"],
            registry=registry,
        )
        self._lag = Histogram(
            "offsite_event_loop_lag_seconds", "How late a timer comes.", buckets=SHORT, registry=registry
        )
        self._writes = Histogram(
            "offsite_journal_write_seconds", "Transactions of this gateway.", buckets=SHORT, registry=registry
        )
        self._steps = Histogram(
            "offsite_step_seconds",
            "Steps of runs, by the gateway that leads.",
            ["step"],
            buckets=SECONDS,
            registry=registry,
        )
        self._uploads.labels("accepted", "")
        for direction in ("down", "up"):
            self._bytes.labels(direction)
        for step in ("build", "aggregate", "evaluate", *STEPS.values()):
            self._steps.labels(step)
        self._gauged: Gauged | None = None
        self._since, self._done = time.time(), set[tuple[str, str]]()
        self._beat_at = time.monotonic()
        self._looked_at, self._hindrance, self._looking = float("-inf"), "", threading.Lock()
        self._exposition = Exposition(address, registry, alive=self._stuck, ready=self._hindered)
        self.address = self._exposition.address

    # what is told

    def sent(self, size: int) -> None:
        """Count bytes of files that were sent."""
        self._bytes.labels("down").inc(size)

    def received(self, size: int) -> None:
        """Count bytes of updates that were received."""
        self._bytes.labels("up").inc(size)

    @contextmanager
    def upload(self) -> Iterator[None]:
        """Count an upload as what becomes of it."""
        try:
            yield
        except OffsiteError as error:
            self._uploads.labels("refused", error.status.lower()).inc()
            raise
        self._uploads.labels("accepted", "").inc()

    def begin(self, gauged: Gauged) -> None:
        """Begin: the gateway serves."""
        gauged.journal.timed = self._writes.observe
        with suppress(OffsiteError):
            self._done = gauged.journal.steps_since(self._since)  # of an earlier process
        self._gauged = gauged

    async def work(self) -> None:
        """Look how long the event loop is busy, again and again."""
        while True:
            start = time.monotonic()
            await asyncio.sleep(BEAT_S)
            self._beat_at = time.monotonic()
            self._lag.observe(max(0.0, self._beat_at - start - BEAT_S))

    def end(self) -> None:
        """End: the gateway serves no more."""
        self._gauged = None
        self._exposition.close()

    # what is asked

    def _stuck(self) -> str:
        return "the event loop is stuck" if self._gauged and time.monotonic() - self._beat_at > STUCK_S else ""

    def _hindered(self) -> str:
        """Return why the gateway cannot serve: it starts or ends, or a store cannot be reached."""
        with self._looking:
            if time.monotonic() - self._looked_at > FRESH_S:
                self._hindrance = self._look()
                self._looked_at = time.monotonic()
            return self._hindrance

    def _look(self) -> str:
        if not (gauged := self._gauged):
            return "it starts or ends"
        for name, look in (("journal", gauged.journal.leader), ("blobs", gauged.blobs.check)):
            try:
                look()
            except OffsiteError:
                return f"the {name} cannot be reached; the log says more"
        return ""

    def collect(self) -> Iterator[Metric]:
        """Yield what is looked at; of a journal that cannot be read, only that."""
        yield InfoMetricFamily("offsite", "This version.", value={"version": version("offsite")})
        if not (gauged := self._gauged):
            return
        yield GaugeMetricFamily("offsite_leads", "Whether this gateway dispatches.", value=gauged.leads())
        yield GaugeMetricFamily("offsite_sites_waiting", "Sites that wait here for a task.", value=gauged.waiting())
        cache, free = gauged.home.node.cached(), gauged.home.node.free()
        yield GaugeMetricFamily("offsite_cache_bytes", "Blobs of a bucket that are kept near.", value=cache)
        yield GaugeMetricFamily("offsite_disk_free_bytes", "Room on the disk of the home.", value=free)
        try:
            runs, tasks = gauged.journal.runs_by_state(), gauged.journal.open_tasks_by_state()
            present = len(gauged.journal.present(time.time() - PRESENT_S))
            self._observe(gauged)
        except OffsiteError:
            yield GaugeMetricFamily("offsite_journal_reachable", "Whether the journal can be read.", value=0)
            return
        yield GaugeMetricFamily("offsite_journal_reachable", "Whether the journal can be read.", value=1)
        yield GaugeMetricFamily(
            "offsite_sites_present", "Sites that were heard just now, by any gateway.", value=present
        )
        yield _by_state("offsite_runs", "Runs.", {state: runs.get(state, 0) for state in (*LIVE, *ENDS)})
        yield _by_state("offsite_tasks_open", "Open tasks.", {state: tasks.get(state, 0) for state in OPEN})

    def _observe(self, gauged: Gauged) -> None:
        """Count the steps that were done since the last look; they are done in other processes, so by their spans."""
        with self._looking:
            steps = gauged.journal.steps_since(self._since)
            ahead, self._done = steps - self._done, steps
        for run, name in ahead if gauged.leads() else ():
            spans = gauged.journal.step(run, name).get("spans")
            if spans:
                lasted = max(span["end"] for span in spans) - min(span["start"] for span in spans)
                self._steps.labels(_step(name)).observe(lasted)


def _step(name: str) -> str:
    """Return what a step does, by its name in the journal; one of a few words."""
    kind, _, number = name.partition(":")
    if kind == "version":
        return "aggregate" if number != "0" else "build"
    return STEPS.get(kind, "evaluate")


def _by_state(name: str, what: str, counts: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, what, labels=["state"])
    for state, count in counts.items():
        family.add_metric([state], count)
    return family
