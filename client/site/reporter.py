"""How a task goes, told to the coordinator: a state, a step, bytes, and at the end a reason of a list."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from offsite.client.channel import Channel
from offsite.client.site.meter import Meter
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc
from offsite.protos.errors import NotFoundError, OffsiteError, RefusedError
from offsite.protos.spec import TaskSpec

log = logging.getLogger(__name__)


class Reporter:
    """Tells the coordinator how a task goes: at once on a change, and as a heartbeat in between."""

    def __init__(
        self, channel: Channel, fleet: fleet_pb2_grpc.FleetStub, task: TaskSpec, *, every_s: float, meter: Meter
    ) -> None:
        self.key = pb.TaskKey(run=task.run, round=task.round, attempt=task.attempt)
        self.bytes_down, self._meter = 0, meter
        self.stopped = False
        self._channel, self._fleet, self._every_s = channel, fleet, every_s
        self._report = pb.ReportRequest(key=self.key, state=pb.DOWNLOADING)
        self._stop: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def count(self, size: int) -> None:
        """Add to the bytes received, from any thread."""
        with self._lock:
            self.bytes_down += size
            self._meter.received(size)

    def on_stop(self, stop: Callable[[], None]) -> None:
        """Say what to call when the coordinator wants the task stopped."""
        self._stop = stop
        if self.stopped:  # heard meanwhile
            stop()

    def now(self, state: "pb.TaskState", **about: Any) -> None:
        """Report a change, with what may leave of a step. An unreachable coordinator does not disturb the work."""
        self._meter.state(pb.TaskState.Name(state).lower())
        with self._lock:
            self._report = pb.ReportRequest(key=self.key, state=state, **about)
        self._send(timeout_s=5.0)

    def last(self, reason: str, *, lines: Sequence[str] = ()) -> None:
        """Report why the task ended without an update, with the channel's patience."""
        self._closed.set()
        state = pb.REFUSED if reason.startswith("BOUND_") else pb.FAILED
        request = pb.ReportRequest(key=self.key, state=state, reason=reason, bytes_down=self.bytes_down, lines=lines)
        try:
            self._channel.call(self._fleet.Report, request)
        except OffsiteError as error:
            log.warning("could not report the end of a task: %s", error)

    def measured(self, exam: str) -> None:
        """Report what an exam gave, with the channel's patience; raises OffsiteError where that is not kept."""
        self._closed.set()
        request = pb.ReportRequest(key=self.key, state=pb.MEASURED, exam=exam, bytes_down=self.bytes_down)
        self._channel.call(self._fleet.Report, request)

    def close(self) -> None:
        """End the heartbeat."""
        self._closed.set()
        self._thread.join(timeout=10)

    def _beat(self) -> None:
        while not self._closed.wait(self._every_s):
            self._send(timeout_s=self._every_s)

    def _send(self, *, timeout_s: float) -> None:
        with self._lock:
            self._report.bytes_down = self.bytes_down
            request = self._report
        try:
            stop = self._channel.once(self._fleet.Report, request, timeout_s=timeout_s).stop
            self._meter.met()
        except (RefusedError, NotFoundError):
            stop = True
        except OffsiteError:  # the heartbeat outlives whatever the network does
            stop = False
        if stop and not self.stopped:
            self.stopped = True
            self._stop()
