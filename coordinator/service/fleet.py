"""What sites call: thin over the journal, decides nothing."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from offsite.coordinator.home import Home
from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.progress import Told, ahead
from offsite.coordinator.service.reasons import sentence
from offsite.coordinator.service.transfers import parts, send
from offsite.coordinator.service.uploads import Upload, key_of
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.journal import LIVE, OPEN, Journal, Key, Row
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc, transfer_pb2
from offsite.protos.documents import from_json, plain
from offsite.protos.errors import InputError, NotFoundError
from offsite.protos.events import SiteState
from offsite.protos.ranges import finite
from offsite.protos.spec import Manifest, TaskSpec

POLL_S = 0.1
REPORT_EVERY_S = 2.0
STATES = {
    pb.DOWNLOADING: "downloading",
    pb.LOADING: "loading",
    pb.TRAINING: "training",
    pb.UPLOADING: "uploading",
    pb.REFUSED: "refused",
    pb.FAILED: "failed",
}


class FleetService(fleet_pb2_grpc.FleetServicer):
    """The Fleet service."""

    def __init__(self, home: Home, journal: Journal, blobs: Blobs, gate: Gate) -> None:
        self._home, self._journal, self._blobs, self._gate = home, journal, blobs, gate
        self._told = Told(journal)
        self._seen: dict[str, float] = {}  # site -> when the journal was last told that it is here
        # One stream at a time for a task; a lock is there as long as a stream holds it or waits for it.
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        """Record the site under the name in its certificate."""
        async with self._gate(context, "site", request=request) as site:
            self._journal.enrol(
                site.name, examples=request.examples, version=plain(request.version), policy=plain(request.policy)
            )
            return pb.EnrolReply(site=site.name, report_every_s=REPORT_EVERY_S)

    def _see(self, site: str) -> None:
        """Record now and then that a site which waits or works is here."""
        if time.monotonic() - self._seen.get(site, float("-inf")) >= REPORT_EVERY_S:
            self._journal.see(site)
            self._seen[site] = time.monotonic()

    async def PullTask(self, request: pb.PullTaskRequest, context: Any) -> pb.PullTaskReply:
        """Answer with the site's next open task, waiting for one if need be."""
        async with self._gate(context, "site", request=request) as site:
            deadline = time.monotonic() + min(request.wait_s, 60.0)
            while not (tasks := self._journal.open_tasks(site.name)):
                self._see(site.name)
                if not time.monotonic() < deadline:
                    return pb.PullTaskReply()
                await asyncio.sleep(POLL_S)
                self._gate.recheck(site)
            self._take(tasks[0])
            return pb.PullTaskReply(task=tasks[0].spec, signature=tasks[0].signature)

    def _take(self, task: Row) -> None:
        """Record that a task was handed out, once: from then on it must get further, and its longest time runs."""
        if task.state == "offered":
            key = Key(task.run, task.round, task.site, task.attempt)
            self._told.tell(key, task, state="taken", step=0, bytes_down=0)

    async def Download(self, request: transfer_pb2.DownloadRequest, context: Any) -> None:
        """Send a blob of the site's current tasks; no other can be had."""
        async with self._gate(context, "site", request=request, transfer=True) as site:
            if request.digest not in self._granted(site.name):
                raise NotFoundError(f"{plain(request.digest)} is not part of a task of {site.name}")
            path = await asyncio.to_thread(self._blobs.served, request.digest)
            await send(path, request.offset, context, partial(self._gate.recheck, site))

    def _granted(self, site: str) -> set[str]:
        granted: set[str] = set()
        for task in self._journal.open_tasks(site):
            spec = from_json(TaskSpec, task.spec, where="task")
            manifest = from_json(Manifest, self._blobs.served(spec.manifest).read_bytes(), where="manifest")
            granted |= {spec.manifest, spec.adapter} | {entry.digest for entry in manifest.files}
        return granted

    async def ResumeUpload(self, request: pb.UploadHeader, context: Any) -> pb.UploadOffset:
        """Say where an upload goes on."""
        async with self._gate(context, "site", request=request) as site:
            upload = Upload(self._home, self._journal, self._blobs, site.name, request)
            return pb.UploadOffset(complete=True) if upload.complete else pb.UploadOffset(offset=upload.offset())

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadPart], context: Any) -> pb.UploadReceipt:
        """Take an update; the receipt follows once it is checked and durable."""
        async with self._gate(context, "site", transfer=True) as site:
            recheck = partial(self._gate.recheck, site)
            return pb.UploadReceipt(digest=await self._receive(site.name, parts(request_iterator), recheck))

    async def _receive(self, site: str, stream: AsyncIterator[pb.UploadPart], recheck: Callable[[], None]) -> str:
        first = await anext(stream, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InputError("upload: the first part must be the header")
        key = key_of(first.header.key, site)
        self._journal.task(key)  # raises: no state for what does not exist
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:  # a stream that was broken may still end here
            upload = Upload(self._home, self._journal, self._blobs, site, first.header)
            if upload.complete:
                return upload.digest
            upload.offset()
            async for part in stream:
                recheck()
                upload.write(part.chunk.offset, part.chunk.data)
            recheck()
            digest = await asyncio.to_thread(upload.finish)
        self._told.forget(key)
        return digest

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportReply:
        """Record progress; tell the site to stop when its task is closed."""
        async with self._gate(context, "site", request=request) as site:
            if request.state not in STATES:
                raise InputError(f"report: unknown state {request.state}")
            key, state = key_of(request.key, site.name), STATES[request.state]
            task = self._journal.task(key)
            self._see(site.name)
            if task.state not in OPEN or self._journal.run(key.run).state not in LIVE:
                self._told.forget(key)
                return pb.ReportReply(stop=state in OPEN)
            most = from_json(TaskSpec, task.spec, where="task").training.steps
            if not request.step <= request.steps <= most:
                raise InputError(f"report: step {request.step} of {request.steps}, the task has {most}")
            received = max(request.bytes_down, task.bytes_down)
            told: dict[str, Any] = {"state": state, "step": request.step, "steps": request.steps}
            told |= {"loss": finite(request.loss)} if request.HasField("loss") else {}
            told |= {"message": "" if state in OPEN else sentence(request.reason), "bytes_down": received}
            if state not in OPEN:
                self._told.forget(key)
                self._journal.set_task(key, SiteState(round=key.round + 1, site=site.name, **told), **told)
                return pb.ReportReply()
            if ahead(task, state=state, step=request.step, received=received):
                return pb.ReportReply(stop=not self._told.tell(key, task, **told))
            return pb.ReportReply()
