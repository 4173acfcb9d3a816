"""What sites call: thin over the journal, decides nothing."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import lru_cache, partial
from typing import Any
from weakref import WeakValueDictionary

from offsite.coordinator.home import Home
from offsite.coordinator.runs import outs
from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.progress import Pace, ahead
from offsite.coordinator.service.reasons import sentence
from offsite.coordinator.service.threads import Batch, in_thread
from offsite.coordinator.service.transfers import parts, receive, send
from offsite.coordinator.service.uploads import Upload, key_of
from offsite.coordinator.service.waiting import WaitingRoom
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.journal import OPEN, Journal, Key, Move, Row
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc, transfer_pb2
from offsite.protos.documents import from_json, parse, plain
from offsite.protos.errors import InputError, NotFoundError
from offsite.protos.events import LINE, LINES, Examined, SiteState, Usage
from offsite.protos.exams import Exam
from offsite.protos.frames import Piece
from offsite.protos.ranges import finite
from offsite.protos.spec import Manifest, TaskSpec
from offsite.protos.telemetry.logs import about

REPORT_EVERY_S = 2.0
REASON = 200  # characters of what a site gives as a reason
MANIFESTS = 64  # whose lists of files are remembered
STATES = {
    pb.AWAITING_APPROVAL: "awaiting approval",
    pb.DOWNLOADING: "downloading",
    pb.LOADING: "loading",
    pb.TRAINING: "training",
    pb.UPLOADING: "uploading",
    pb.REFUSED: "refused",
    pb.FAILED: "failed",
    pb.MEASURED: "measured",
}

log = logging.getLogger(__name__)


class FleetService(fleet_pb2_grpc.FleetServicer):
    """The Fleet service."""

    def __init__(self, home: Home, journal: Journal, blobs: Blobs, gate: Gate, changes: Changes) -> None:
        self._home, self._journal, self._blobs, self._gate = home, journal, blobs, gate
        self.waiting = WaitingRoom(journal, gate, changes)
        self._pace = Pace()
        self._moved = Batch(journal.move_tasks)
        self._manifests: dict[str, frozenset[str]] = {}
        # One stream at a time for a task; a lock is there as long as a stream holds it or waits for it.
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        """Record the site under the name in its certificate."""
        async with self._gate(context, "site", request=request) as site:
            values = {"examples": request.examples, "version": plain(request.version), "policy": plain(request.policy)}
            await in_thread(self._journal.enrol, site.name, **values)
            log.info("the site is here, with %d examples", request.examples)
            return pb.EnrolReply(site=site.name, report_every_s=REPORT_EVERY_S)

    async def PullTask(self, request: pb.PullTaskRequest, context: Any) -> pb.PullTaskReply:
        """Answer with the site's next open task, waiting for one if need be."""
        async with self._gate(context, "site", request=request) as site:
            task = await self.waiting.task(site, min(request.wait_s, 60.0))
            if task is None:
                return pb.PullTaskReply()
            await self._take(task)
            return pb.PullTaskReply(task=task.spec, signature=task.signature)

    async def _take(self, task: Row) -> None:
        """Record that a task was handed out, once: from then on it must get further, and its longest time runs."""
        if task.state == "offered":
            key = Key(task.run, task.round, task.site, task.attempt)
            await self._move(key, self._pace.move(key, task, state="taken", step=0, bytes_down=0))

    async def _move(self, key: Key, move: Move | None) -> bool:
        """Record a change of an open task, if there is one to record; False when the task is closed."""
        if move is None or await self._moved(move):
            return True
        self._pace.forget(key)
        return False

    async def Download(self, request: transfer_pb2.DownloadRequest, context: Any) -> None:
        """Send a blob of the site's current tasks; no other can be had."""
        async with self._gate(context, "site", request=request, transfer=True) as site:
            if request.digest not in await in_thread(self._granted, site.name):
                raise NotFoundError(f"{plain(request.digest)} is not part of a task of {site.name}")
            await send(self._blobs, request, context, self._gate.rechecks(site), self._gate.meter.sent)

    def _granted(self, site: str) -> set[str]:
        granted: set[str] = set()
        for task in self._journal.open_tasks(site):
            spec = _task(task.spec)
            granted |= {spec.manifest, spec.adapter} | self._listed(spec.manifest)
            granted |= {spec.anchor} if spec.anchor else set()
        return granted

    def _listed(self, digest: str) -> frozenset[str]:
        """Return the files that a manifest lists; a digest's content never changes, so each is read once."""
        if digest not in self._manifests:
            if len(self._manifests) >= MANIFESTS:
                self._manifests.clear()
            manifest = from_json(Manifest, self._blobs.served(digest).read_bytes(), where="manifest")
            self._manifests[digest] = frozenset(entry.digest for entry in manifest.files)
        return self._manifests[digest]

    async def Upload(
        self, request_iterator: AsyncIterator[Piece | pb.UploadHeader], context: Any
    ) -> AsyncIterator[pb.UploadState]:
        """Take an update; the receipt follows once it is checked and durable."""
        async with self._gate(context, "site", transfer=True) as site:
            stream = parts(request_iterator, self._gate.rechecks(site))
            first = await anext(stream, None)
            if not isinstance(first, pb.UploadHeader):
                raise InputError("upload: the first part must be the header")
            key = key_of(first.key, site.name)
            await in_thread(self._journal.task, key)  # raises: no state for what does not exist
            with about(run=key.run, round=key.round + 1):
                async with self._locks.setdefault(key, asyncio.Lock()):  # a stream that was broken may still end here
                    upload = await in_thread(Upload, self._home, self._journal, self._blobs, site.name, first)
                    if not upload.complete:
                        with self._gate.meter.upload():
                            async for kept in receive(upload, stream, self._gate.meter.received):
                                yield pb.UploadState(kept=kept)
                        self._pace.forget(key)
                        log.info("the update is accepted: %d bytes", first.size)
                    yield pb.UploadState(digest=upload.digest)

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportReply:
        """Record progress; tell the site to stop when its task is closed."""
        async with self._gate(context, "site", request=request) as site:
            if request.state not in STATES:
                raise InputError(f"report: unknown state {request.state}")
            key, state = key_of(request.key, site.name), STATES[request.state]
            task, wanted = await in_thread(self._standing, key)
            self.waiting.hear(site.name)
            if not wanted:
                self._pace.forget(key)
                return pb.ReportReply(stop=state in OPEN)
            spec = _task(task.spec)
            most = spec.training.steps
            if not request.step <= request.steps <= most:
                raise InputError(f"report: step {request.step} of {request.steps}, the task has {most}")
            received = max(request.bytes_down, task.bytes_down)
            progress: dict[str, Any] = {"state": state, "step": request.step, "steps": request.steps}
            progress |= {"loss": finite(request.loss)} if request.HasField("loss") else {}
            message = "" if state in (*OPEN, "measured") else sentence(request.reason)
            progress |= {"message": message, "bytes_down": received}
            if state not in OPEN:
                self._pace.forget(key)
                await self._move(key, Move(key, *_ended(request, spec, progress)))
                return pb.ReportReply()
            if ahead(task, state=state, step=request.step, received=received):
                move = self._pace.move(key, task, also=_also(request), **progress)
                return pb.ReportReply(stop=not await self._move(key, move))
            return pb.ReportReply()

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveReply:
        """Take the site out of runs, by its own will."""
        async with self._gate(context, "site", request=request) as site:
            reason = plain(request.reason, most=REASON)
            left = await in_thread(partial(outs.leave, self._journal, site.name, run=request.run, reason=reason))
            log.info("the site has left %s", ", ".join(left) or "no run")
            return pb.LeaveReply(runs=left)

    def _standing(self, key: Key) -> tuple[Row, bool]:
        """Return a task, and whether it is still wanted."""
        task = self._journal.task(key)
        return task, task.state in OPEN and self._journal.is_live(key.run)


def _ended(
    request: pb.ReportRequest, task: TaskSpec, progress: dict[str, Any]
) -> tuple[dict[str, Any], SiteState | Examined | None]:
    """Return how a task ends without an update: the fields that change, and the event that tells of it.

    Of an exam that a site could not do, or of which it tells nothing, nothing is told. Raises InputError.
    """
    if request.state == pb.MEASURED and not task.examines:
        raise InputError("report: the task is to train, and not only to measure")
    if not task.examines:
        return progress, SiteState(round=task.round + 1, site=task.site, **progress, **_also(request))
    if request.state != pb.MEASURED or not request.exam:
        return progress, None
    exam = from_json(Exam, request.exam, where="report: exam")
    return progress | {"metrics": request.exam}, Examined(round=task.examines, site=task.site, exam=exam)


def _also(request: pb.ReportRequest) -> dict[str, Any]:
    """Return what a site tells of its machine and its trainer's log; raises InputError."""
    told: dict[str, Any] = {}
    if request.lines:
        told["lines"] = tuple(plain(line, most=LINE) for line in request.lines[-LINES:])
    if request.HasField("usage"):
        fields = {name.name: value for name, value in request.usage.ListFields()}
        told["usage"] = parse(Usage, {"memory_bytes": 0, "cpu_s": 0.0, **fields}, where="report: usage")
    return told


@lru_cache(maxsize=4096)
def _task(spec: bytes) -> TaskSpec:
    """Read a task; the same ones come again with every call of their sites."""
    return from_json(TaskSpec, spec, where="task")
