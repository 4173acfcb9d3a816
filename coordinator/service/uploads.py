"""Uploads that survive: spooled as they come, resumed by offset, checked, then kept before they are acknowledged."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from offsite.coordinator.home import Home
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.partial import part_of, schema_of
from offsite.coordinator.runs.steps.results import BUILD
from offsite.coordinator.runs.versions import read_schema
from offsite.coordinator.service.spool import SpoolFile
from offsite.coordinator.store.blobs import Blobs, room
from offsite.coordinator.store.journal import LIVE, OPEN, Journal, Key
from offsite.emulator.parts import Scoring
from offsite.kernels.schema import Schema
from offsite.protos.chunks import algorithm_of, hasher, hex_of, is_digest, read_chunks
from offsite.protos.documents import from_json, plain
from offsite.protos.errors import InputError, MismatchError, RefusedError, UnreachableError
from offsite.protos.events import UpdateAccepted
from offsite.protos.fleet_pb2 import TaskKey, UploadHeader
from offsite.protos.spec import RunSpec, TaskSpec, UpdateMetrics

if TYPE_CHECKING:
    from offsite.protos.upload.change import Change

HEADER_BYTES = 1 << 20  # more than any safetensors header of an update takes


class Upload:
    """One update on its way in, of one task."""

    def __init__(self, home: Home, journal: Journal, blobs: Blobs, site: str, header: UploadHeader) -> None:
        self._journal, self._blobs, self._header = journal, blobs, header
        self._key = key_of(header.key, site)
        self._task = journal.task(self._key)
        self._spec = from_json(TaskSpec, self._task.spec, where="task")
        if not is_digest(header.digest):
            raise InputError(f"{self._what()}: {header.digest!r} is not a digest")
        self._stem = f"{header.key.run}-{header.key.round}-{site}-{header.key.attempt}-"
        self._file = home.spool / (self._stem + hex_of(header.digest))
        self._run = journal.run(header.key.run)
        self._output: SpoolFile | None = None
        self._change: Change | None = None
        self._whole, self._kept = hasher(algorithm_of(header.digest)), 0

    @property
    def complete(self) -> bool:
        """Whether this very update was accepted before; another one for the same task is refused."""
        if self._task.state == "uploaded" and self._task.update != self._header.digest:
            raise MismatchError(f"{self._what()}: an update was accepted before, with digest {self._task.update}")
        return bool(self._task.state == "uploaded")

    @property
    def digest(self) -> str:
        """The digest of the update, as its header names it."""
        return str(self._header.digest)

    def _what(self) -> str:
        return f"update of {self._key.site}, round {self._key.round + 1}"

    def begin(self) -> int:
        """Open what is kept already and return its size; raises when the update is not wanted or cannot fit."""
        if self._task.state not in OPEN or self._run.state not in LIVE:
            state = self._task.state if self._run.state in LIVE else f"run {self._run.state}"
            raise RefusedError(f"{self._what()}: the task is closed ({state}); the update is not wanted")
        for other in self._file.parent.glob(self._stem + "*"):  # one half upload per task: disks are finite
            if other != self._file:
                other.unlink()
        limit = self._spec.update_size + HEADER_BYTES
        if not 0 < self._header.size <= limit:
            raise MismatchError(f"{self._what()}: {self._header.size} bytes announced, at most {limit} can be right")
        room(self._file.parent, self._header.size)
        part = part_of(self._spec.training)
        # What stages have packed is judged when it has come, and so is what a site chose.
        if not self._spec.upload and not isinstance(part, Scoring):
            from offsite.protos.upload.change import Change  # torch: a server that only waits needs none

            self._change = Change(self._blobs.served(self._spec.adapter), self._schema() if part.partial else None)
        self._output = SpoolFile(self._file, self._header.size)
        for _, data in read_chunks(self._file):
            self._see(data)
        return self._kept

    def _schema(self, chosen: Sequence[int] = ()) -> Schema:
        """Return what the update has before stages pack it; raises MismatchError for a choice that no site can make."""
        schema = read_schema(self._blobs, History(self._journal, self._key.run)[BUILD].schema)
        try:
            return schema_of(self._spec, schema, chosen=chosen)
        except ValueError as error:
            raise MismatchError(f"{self._what()}: {error}") from error

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Append a chunk and return what came; raises UnreachableError, to resume, unless the chunk goes on there.

        While it is written, its hash is taken, and how far it is from its broadcast: a complete update is not read
        again.
        """
        if offset != self._kept:
            # Of a stream that lost the race with its own successor: the site asks again where to go on.
            raise UnreachableError(f"{self._what()}: chunk at byte {offset}, expected at {self._kept}; resume")
        if offset + len(data) > self._header.size:
            raise MismatchError(f"{self._what()}: more bytes than the {self._header.size} announced")
        assert self._output is not None, "begin() opens it"
        self._output.write(data)
        self._see(data)
        return self._kept

    def _see(self, data: bytes | memoryview) -> None:
        self._whole.update(data)
        if self._change:
            self._change.add(data)
        self._kept += len(data)

    def close(self) -> None:
        """Close the files; what is kept stays, to be resumed."""
        if self._change is not None:
            self._change.close()
        if self._output is not None:
            self._output.close()

    def finish(self) -> None:
        """Check the whole update, make it durable, close the task."""
        if self._kept < self._header.size:
            raise InputError(f"{self._what()}: {self._kept} of {self._header.size} bytes came; resume the upload")
        assert self._output is not None, "begin() opens it"
        self._output.flush()
        from offsite.protos.upload.admission import admit, admit_metrics  # torch: a server that only waits needs none

        try:
            self._check_digest()
            metrics = from_json(UpdateMetrics, self._header.metrics, where=f"{self._what()}: metrics")
            admit_metrics(metrics, self._spec)
            schema = self._schema(metrics.chosen)
            most = from_json(RunSpec, self._run.spec, where="run spec").max_update_norm
            broadcast = self._blobs.served(self._spec.adapter)
            norm = admit(self._file, self._spec, schema, broadcast=broadcast, change=self._change, max_norm=most)
            size = self._blobs.keep(self._file, self.digest)
        except (InputError, MismatchError) as error:
            self._file.unlink(missing_ok=True)
            self.fail(str(error))
            raise
        values = {"state": "uploaded", "update": self.digest, "norm": norm, "moved_at": time.time()}
        values |= {"metrics": self._header.metrics, "bytes_up": size}
        site, number, examples = self._key.site, self._key.round + 1, metrics.examples
        accepted = UpdateAccepted(
            round=number, site=site, loss=metrics.loss, bytes=size, examples=examples, exam=metrics.exam
        )
        if not self._journal.set_task(self._key, accepted, **values):
            if self._journal.task(self._key).update != self.digest:
                raise RefusedError(f"{self._what()}: the task was closed meanwhile; the update is not wanted")

    def _check_digest(self) -> None:
        digest = f"{algorithm_of(self.digest)}:{self._whole.hexdigest()}"
        if digest != self.digest:
            raise MismatchError(f"{self._what()}: its digest is {digest}, announced was {self.digest}")

    def fail(self, message: str) -> None:
        """Close the attempt; the supervisor may offer another."""
        self._journal.close_task(self._key, "failed", plain(message))  # it may quote names from the file


def key_of(key: TaskKey, site: str) -> Key:
    """Return the journal's key of a task of a site."""
    return Key(run=key.run, round=key.round, site=site, attempt=key.attempt)
