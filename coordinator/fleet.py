"""What sites call: thin over the journal, decides nothing."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

from offsite.coordinator.answer import Gate
from offsite.coordinator.home import Home
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.journal import LIVE, Journal, Key
from offsite.coordinator.uploads import Upload, key_of
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc, transfer_pb2
from offsite.protos.chunks import read_chunks
from offsite.protos.documents import from_json, plain
from offsite.protos.errors import InputError, NotFoundError
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
        self._locks: defaultdict[Key, asyncio.Lock] = defaultdict(asyncio.Lock)  # one stream at a time for a task

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        """Record the site under the name in its certificate."""
        async with self._gate(context, "site") as site:
            self._journal.enrol(
                site.name, examples=request.examples, version=plain(request.version), policy=plain(request.policy)
            )
            return pb.EnrolReply(site=site.name, report_every_s=REPORT_EVERY_S)

    async def PullTask(self, request: pb.PullTaskRequest, context: Any) -> pb.PullTaskReply:
        """Answer with the site's next open task, waiting for one if need be."""
        async with self._gate(context, "site") as site:
            deadline, told = time.monotonic() + min(request.wait_s, 60.0), float("-inf")
            while not (tasks := self._journal.open_tasks(site.name)):
                if time.monotonic() - told >= REPORT_EVERY_S:  # a site that waits is here
                    self._journal.see(site.name)
                    told = time.monotonic()
                if not time.monotonic() < deadline:
                    return pb.PullTaskReply()
                await asyncio.sleep(POLL_S)
            return pb.PullTaskReply(task=tasks[0].spec, signature=tasks[0].signature)

    async def Download(self, request: transfer_pb2.DownloadRequest, context: Any) -> AsyncIterator[transfer_pb2.Chunk]:
        """Send a blob of the site's current tasks; no other can be had."""
        async with self._gate(context, "site") as site:
            if request.digest not in self._granted(site.name):
                raise NotFoundError(f"{request.digest} is not part of a task of {site.name}")
            for offset, data in read_chunks(self._blobs.path(request.digest), offset=request.offset):
                yield transfer_pb2.Chunk(offset=offset, data=data)

    def _granted(self, site: str) -> set[str]:
        granted: set[str] = set()
        for task in self._journal.open_tasks(site):
            spec = from_json(TaskSpec, task.spec, where="task")
            manifest = from_json(Manifest, self._blobs.path(spec.manifest).read_bytes(), where="manifest")
            granted |= {spec.manifest, spec.adapter} | {entry.digest for entry in manifest.files}
        return granted

    async def ResumeUpload(self, request: pb.UploadHeader, context: Any) -> pb.UploadOffset:
        """Say where an upload goes on."""
        async with self._gate(context, "site") as site:
            upload = Upload(self._home, self._journal, self._blobs, site.name, request)
            return pb.UploadOffset(complete=True) if upload.complete else pb.UploadOffset(offset=upload.offset())

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadPart], context: Any) -> pb.UploadReceipt:
        """Take an update; the receipt follows once it is checked and durable."""
        async with self._gate(context, "site") as site:
            first = await anext(aiter(request_iterator), None)
            if first is None or first.WhichOneof("part") != "header":
                raise InputError("upload: the first part must be the header")
            async with self._locks[key_of(first.header.key, site.name)]:  # a stream that was broken may still end here
                upload = Upload(self._home, self._journal, self._blobs, site.name, first.header)
                if upload.complete:
                    return pb.UploadReceipt(digest=first.header.digest)
                upload.offset()
                async for part in request_iterator:
                    upload.write(part.chunk.offset, part.chunk.data)
                return pb.UploadReceipt(digest=await asyncio.to_thread(upload.finish))

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportReply:
        """Record progress; tell the site to stop when its task is closed."""
        async with self._gate(context, "site") as site:
            if request.state not in STATES:
                raise InputError(f"report: unknown state {request.state}")
            self._journal.see(site.name)
            key, state = key_of(request.key, site.name), STATES[request.state]
            before = self._journal.task(key)
            run = self._journal.run(request.key.run)
            progress = {"step": request.step, "steps": request.steps, "loss": request.loss}
            told: dict[str, Any] = {"state": state, "message": plain(request.message), **progress}
            received = max(request.bytes_down, before.bytes_down)
            told["bytes_down"] = received
            moved = (before.state, before.step, before.bytes_down) != (state, request.step, received)
            at = {"moved_at": time.time()} if moved else {}
            live = run.state in LIVE and self._journal.set_task(key, **told, **at)
            if live and moved:
                self._journal.add_event(request.key.run, "site", round=request.key.round + 1, site=site.name, **told)
            return pb.ReportReply(stop=not live and state not in ("refused", "failed"))
