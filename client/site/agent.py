"""The site's agent: dials out, pulls a task, holds it against the policy, trains in a process of its own, uploads.

It holds no tensor library and no state but files: started again after a kill, it is given the same task, finds what
was downloaded or trained already, and goes on.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offsite.client.channel import Channel
from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.launch import launch
from offsite.client.site.policy import Policy
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc
from offsite.protos.chunks import digest_bytes, digest_file
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import (
    IdentityError,
    MismatchError,
    NotFoundError,
    OffsiteError,
    RefusedError,
    ResourceError,
    UnreachableError,
    from_system,
)
from offsite.protos.security.identity import Identity
from offsite.protos.security.signing import verify
from offsite.protos.spec import Manifest, Span, TaskSpec, UpdateMetrics

WAIT_S = 20.0  # one long poll
RETRY_S = 10.0  # before asking again a coordinator that has no room

log = logging.getLogger(__name__)
Say = Callable[[str, dict[str, Any]], None]


class Stopped(Exception):
    """The coordinator no longer wants the task."""


@dataclass(frozen=True)
class SiteConfig:
    """What a site is run with."""

    identity: Identity
    policy: Policy
    policy_digest: str
    data: Path
    examples: int
    work: Path
    engine: EngineSpec


class Agent:
    """One site's loop."""

    def __init__(self, channel: Channel, config: SiteConfig, *, say: Say) -> None:
        self._channel, self._config, self._say = channel, config, say
        self._fleet = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
        self._report_every_s = 2.0

    def run(self) -> None:
        """Work until interrupted. Raises IdentityError when the coordinator will not have this site."""
        self._enrol()
        if warning := self._config.identity.warning:
            self._say("warning", {"message": warning})
        while True:
            try:
                self._once()
            except UnreachableError as error:
                self._say("waiting", {"message": str(error)})
            except (IdentityError, MismatchError):
                raise  # a revoked kit, or a task that the owner has not signed
            except OffsiteError as error:  # the coordinator's own trouble
                self._say("waiting", {"message": str(error)})
                time.sleep(RETRY_S)

    def _enrol(self) -> None:
        request = pb.EnrolRequest(
            version=version("offsite"), policy=self._config.policy_digest, examples=self._config.examples
        )
        reply = self._channel.call(self._fleet.Enrol, request)
        self._report_every_s = reply.report_every_s
        self._say("enrolled", {"site": reply.site, "coordinator": self._channel.target})

    def _once(self) -> None:
        reply = self._channel.call(self._fleet.PullTask, pb.PullTaskRequest(wait_s=WAIT_S), timeout_s=WAIT_S + 30)
        if not reply.task:
            return
        verify(reply.task, reply.signature, self._config.identity.folder / "owner.pub", purpose="task")
        task = from_json(TaskSpec, reply.task, where="task")
        reporter = Reporter(self._channel, self._fleet, task, every_s=self._report_every_s)
        try:
            self._do(task, reporter)
        except Stopped:
            self._say("stopped", {"run": task.run, "round": task.round + 1})
            self._clear(task)
        except (UnreachableError, IdentityError):
            raise
        except RefusedError as error:
            self._say("refused", {"run": task.run, "round": task.round + 1, "message": str(error)})
            reporter.last(pb.REFUSED, str(error))
            self._clear(task)
        except (OffsiteError, OSError, ValueError) as error:
            message = str(from_system(error) if isinstance(error, OSError) else error)
            self._say("failed", {"run": task.run, "round": task.round + 1, "message": message})
            reporter.last(pb.FAILED, message)
            self._clear(task)
        finally:
            reporter.close()

    def _do(self, task: TaskSpec, reporter: "Reporter") -> None:
        if task.site != self._config.identity.name:
            raise MismatchError(f"the task is for site {task.site}, this is {self._config.identity.name}")
        self._config.policy.check_task(task)
        self._config.policy.check_data(self._config.data)
        self._say(
            "task", {"run": task.run, "round": task.round + 1, "rounds": task.rounds, "steps": task.training.steps}
        )
        folder = self._config.work / task.run / f"round-{task.round}-{task.attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        update, metrics = folder / "update.safetensors", folder / "metrics.json"
        if not (update.exists() and metrics.exists()):
            self._train(task, folder, reporter)
        reporter.now(pb.UPLOADING)
        header = pb.UploadHeader(
            key=reporter.key, digest=digest_file(update), size=update.stat().st_size, metrics=metrics.read_text()
        )
        self._config.policy.check_update(header.size)
        try:
            self._channel.upload(self._fleet, header, update)
        except ResourceError as error:  # there; the task stays open and what was trained is kept
            self._say("waiting", {"message": str(error)})
            time.sleep(RETRY_S)
            return
        self._say("uploaded", {"run": task.run, "round": task.round + 1, "bytes": header.size})
        self._clear(task)

    def _clear(self, task: TaskSpec) -> None:
        """Remove what a task that is over left here; the bundle stays for the next round."""
        shutil.rmtree(self._config.work / task.run / f"round-{task.round}-{task.attempt}", ignore_errors=True)
        self._adapter(task).unlink(missing_ok=True)

    def _adapter(self, task: TaskSpec) -> Path:
        return self._config.work / "adapters" / f"{task.adapter[7:23]}.safetensors"

    def _train(self, task: TaskSpec, folder: Path, reporter: "Reporter") -> None:
        start = time.time()
        manifest, bundle, adapter = self._fetch(task, reporter)
        fetched = Span(kind="transfer", start=start, end=max(start, time.time()))
        reporter.now(pb.LOADING)
        job = TrainerJob(
            bundle=str(bundle),
            manifest=manifest,
            adapter=str(adapter),
            data=str(self._config.data.resolve()),
            folders=tuple(str(Path(folder).resolve()) for folder in self._config.policy.data),
            odd_rows=self._config.policy.odd_rows,
            task=task,
            engine=self._config.engine,
            max_emulator_perplexity=self._config.policy.max_emulator_perplexity,
            suspicious=self._config.policy.suspicious,
            out=str(folder),
        )
        if reporter.stopped:
            raise Stopped
        trainer = launch(job, folder)
        reporter.on_stop(trainer.stop)
        try:
            for event in trainer.events():
                if event["event"] == "step":
                    reporter.now(pb.TRAINING, step=event["step"], steps=event["steps"], loss=event["loss"])
                    self._say("step", {"round": task.round + 1, **{k: event[k] for k in ("step", "steps", "loss")}})
                elif "warnings" in event:
                    self._say_judged(task, event)
        except OffsiteError:
            if reporter.stopped:
                raise Stopped from None
            raise
        finally:
            trainer.stop()
        if reporter.stopped:
            raise Stopped
        told = from_json(UpdateMetrics, (folder / "metrics.json").read_text(), where="metrics")
        spans = (fetched, *told.spans) if reporter.bytes_down else told.spans
        partial = folder / "metrics.partial"
        partial.write_bytes(to_json(UpdateMetrics(**{**vars(told), "spans": spans})))
        partial.replace(folder / "metrics.json")

    def _say_judged(self, task: TaskSpec, event: dict[str, Any]) -> None:
        """Say what the trainer found of the data or of the emulator before it trains."""
        found = {key: value for key, value in event.items() if key not in ("event", "warnings")}
        self._say(event["event"], {"round": task.round + 1, **found})
        for warning in event["warnings"]:
            self._say("warning", {"message": warning})

    def _fetch(self, task: TaskSpec, reporter: "Reporter") -> tuple[Manifest, Path, Path]:
        """Download what is missing of the bundle and the adapter; return the manifest and where they are."""
        reporter.now(pb.DOWNLOADING)
        bundle = self._config.work / "bundles" / task.manifest[7:23]
        document = bundle.with_suffix(".json")
        self._get(task.manifest, document, task.manifest_size, reporter)
        manifest = from_json(Manifest, document.read_bytes(), where="manifest")
        self._config.policy.check_bundle(task, manifest)
        for entry in manifest.files:
            self._get(entry.digest, bundle / entry.path, entry.size, reporter)
        self._get(task.adapter, self._adapter(task), task.adapter_size, reporter)
        return manifest, bundle, self._adapter(task)

    def _get(self, digest: str, path: Path, size: int, reporter: "Reporter") -> None:
        self._channel.download(self._fleet.Download, digest, path, size=size, progress=reporter.count)
        if reporter.stopped:
            raise Stopped


class Reporter:
    """Tells the coordinator how a task goes: at once on a change, and as a heartbeat in between."""

    def __init__(self, channel: Channel, fleet: fleet_pb2_grpc.FleetStub, task: TaskSpec, *, every_s: float) -> None:
        self.key = pb.TaskKey(run=task.run, round=task.round, attempt=task.attempt)
        self.bytes_down = 0
        self.stopped = False
        self._channel, self._fleet, self._every_s = channel, fleet, every_s
        self._report = pb.ReportRequest(key=self.key, state=pb.DOWNLOADING)
        self._stop: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def count(self, size: int) -> None:
        """Add to the bytes received."""
        self.bytes_down += size

    def on_stop(self, stop: Callable[[], None]) -> None:
        """Say what to call when the coordinator wants the task stopped."""
        self._stop = stop
        if self.stopped:  # heard meanwhile
            stop()

    def now(self, state: "pb.TaskState", *, step: int = 0, steps: int = 0, loss: float = 0.0) -> None:
        """Report a change. An unreachable coordinator does not disturb the work."""
        with self._lock:
            self._report = pb.ReportRequest(key=self.key, state=state, step=step, steps=steps, loss=loss)
        self._send(timeout_s=5.0)

    def last(self, state: "pb.TaskState", message: str) -> None:
        """Report how the task ended, with the channel's patience."""
        self._closed.set()
        request = pb.ReportRequest(key=self.key, state=state, message=message, bytes_down=self.bytes_down)
        try:
            self._channel.call(self._fleet.Report, request)
        except OffsiteError as error:
            log.warning("could not report the end of a task: %s", error)

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
        except (RefusedError, NotFoundError):
            stop = True
        except OffsiteError:  # the heartbeat outlives whatever the network does
            stop = False
        if stop and not self.stopped:
            self.stopped = True
            self._stop()


def policy_digest(path: Path) -> str:
    """Digest of a policy file, told to the coordinator for the record."""
    return digest_bytes(path.read_bytes())
