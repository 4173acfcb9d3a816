"""The site's agent: dials out, pulls a task, holds it against the policy, trains in a process of its own, uploads.

It holds no tensor library and no state but files: started again after a kill, it is given the same task, finds what
was downloaded or trained already, and goes on.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offsite.client.apart import all_of
from offsite.client.channel import Channel
from offsite.client.site.approvals import Approvals, request
from offsite.client.site.folder import WorkFolder
from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.launch import fork_server, last, launch
from offsite.client.site.meter import Meter
from offsite.client.site.policy import Policy, refusal
from offsite.client.site.reasons import because, reason
from offsite.client.site.reporter import Reporter
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc
from offsite.protos.chunks import STALL_S, digest_bytes
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import (
    IdentityError,
    InputError,
    MismatchError,
    NotFoundError,
    OffsiteError,
    RefusedError,
    ResourceError,
    UnreachableError,
    from_system,
)
from offsite.protos.events import LINES
from offsite.protos.processes.memory import keep_freed
from offsite.protos.recipes import render
from offsite.protos.security.identity import Identity
from offsite.protos.security.signing import verify
from offsite.protos.spec import Manifest, Span, TaskSpec, UpdateMetrics

PATIENCE_S = 600.0  # with a coordinator that was right before: a person may be replacing its files
WAIT_S = 20.0  # one long poll
LOOK_S = 1.0  # between two looks whether a person has decided
RETRY_S = 10.0  # before asking again a coordinator that has no room
FILES = 2  # downloaded at once: one comes while the other is opened or closed
IDLE_S = 600.0  # without a task, after which the libraries of trainers are given their memory back

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
    work: WorkFolder
    engine: EngineSpec
    meter: Meter = field(default_factory=Meter)


class Agent:
    """One site's loop."""

    def __init__(self, channel: Channel, config: SiteConfig, *, say: Say) -> None:
        self._channel, self._config, self._work = channel, config, config.work
        self._approvals = Approvals(config.work.path)
        self._show = say
        channel.waiting = lambda message: self._say("waiting", {"message": message})
        self._fleet = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
        self._trainers = fork_server(config.engine, config.work.path / "trainers.log")
        self._tasked_at = float("-inf")
        self._report_every_s = 2.0

    def run(self) -> None:
        """Work until interrupted.

        Raises IdentityError or MismatchError when the coordinator will not have this site, or offers what its owner has
        not signed: at once when the site has not been let in yet, else once it has been so for PATIENCE_S.
        """
        keep_freed()
        self._enrol()
        if warning := self._config.identity.warning:
            self._say("warning", {"message": warning})
        self._work.clear_bundles(self._config.policy)
        well = time.monotonic()
        while True:
            try:
                self._once()
                self._config.meter.met()
                well = time.monotonic()
            except UnreachableError as error:
                self._say("waiting", {"message": str(error)})
                well = time.monotonic()
            except (IdentityError, MismatchError) as error:
                # A kit that is not accepted, or a task that the owner has not signed: it may be a file that is being
                # replaced at the coordinator.
                if time.monotonic() - well > PATIENCE_S:
                    raise
                self._say("waiting", {"message": str(error)})
                time.sleep(RETRY_S)
            except (OffsiteError, OSError) as error:  # the coordinator's own trouble, or that of this site's disk
                self._say("waiting", {"message": str(from_system(error) if isinstance(error, OSError) else error)})
                time.sleep(RETRY_S)

    def _say(self, kind: str, data: dict[str, Any]) -> None:
        """Say something of this site, here and in its own log."""
        self._show(kind, data)
        self._config.meter.event(kind, data)
        self._work.write(kind, data)

    def _enrol(self) -> None:
        request = pb.EnrolRequest(
            version=version("offsite"), policy=self._config.policy_digest, examples=self._config.examples
        )
        reply = self._channel.call(self._fleet.Enrol, request)
        self._report_every_s = reply.report_every_s
        self._config.meter.met()
        self._say("enrolled", {"site": reply.site, "coordinator": self._channel.target})

    def _once(self) -> None:
        reply = self._channel.call(self._fleet.PullTask, pb.PullTaskRequest(wait_s=WAIT_S), timeout_s=WAIT_S + STALL_S)
        if not reply.task:
            self._work.clear_tasks()
            if time.monotonic() - self._tasked_at > IDLE_S:
                self._trainers.close()
            return
        verify(reply.task, reply.signature, self._config.identity.folder / "owner.pub", purpose="task")
        task = from_json(TaskSpec, reply.task, where="task")
        every_s, meter = self._report_every_s, self._config.meter
        reporter = Reporter(self._channel, self._fleet, task, every_s=every_s, meter=meter)
        try:
            self._do(task, reporter)
        except Stopped:
            self._say("stopped", {"run": task.run, "round": task.number})
            self._work.clear(task)
        except (UnreachableError, IdentityError):
            raise
        except OffsiteError as error:
            if isinstance(error, ResourceError) and not error.reason:
                raise  # the coordinator has no room: the task stays open, and what was made for it is kept
            self._end(task, reporter, error)
        except OSError as error:
            self._end(task, reporter, from_system(error))
        except ValueError as error:
            self._end(task, reporter, OffsiteError(f"{type(error).__name__}: {error}"))
        finally:
            reporter.close()
            self._tasked_at = time.monotonic()
            self._work.clear_bundles(self._config.policy, used=self._work.bundle(task))

    def _end(self, task: TaskSpec, reporter: Reporter, error: OffsiteError) -> None:
        """Say why a task gives no update: here what happened, to the coordinator a reason of a list."""
        code = reason(error)
        kind = "refused" if isinstance(error, RefusedError) else "failed"
        self._say(kind, {"run": task.run, "round": task.number, "told": code, "message": str(error)})
        for log in sorted(self._work.task(task).glob("rank-*.log")):
            self._work.write("trainer", {"log": log.name, "text": last(log)})
        reporter.last(code, lines=self._lines(self._work.task(task)))
        self._work.clear(task)

    def _do(self, task: TaskSpec, reporter: Reporter) -> None:
        if task.site != self._config.identity.name:
            what = f"the task is for site {task.site}, this is {self._config.identity.name}"
            raise MismatchError(what, reason="FAULT_TASK")
        self._config.policy.check_task(task)
        self._config.policy.check_data(self._config.data)
        self._approve(task, reporter)
        folder = self._work.task(task)
        folder.mkdir(parents=True, exist_ok=True)
        if task.examines:
            self._examine(task, folder, reporter)
            return
        about = {"run": task.run, "round": task.number, "rounds": task.rounds, "steps": task.training.steps}
        self._say("task", about | {"upload": render(task.upload) or "plain"})
        update, digest, metrics = (folder / name for name in ("update.safetensors", "update.digest", "metrics.json"))
        if not (update.exists() and digest.exists() and metrics.exists()):
            self._train(task, folder, reporter)
        reporter.now(pb.UPLOADING)
        header = pb.UploadHeader(
            key=reporter.key, digest=digest.read_text(), size=update.stat().st_size, metrics=metrics.read_text()
        )
        self._config.policy.check_update(header.size)
        self._work.keep_residual(task, header.digest)  # by its name it counts once the coordinator has the update
        self._work.keep_rows(task)
        with because("FAULT_UPDATE", InputError, MismatchError, RefusedError):
            self._channel.upload(self._fleet, header, update)
        self._say("uploaded", {"run": task.run, "round": task.number, "bytes": header.size})
        self._work.clear(task)

    def _examine(self, task: TaskSpec, folder: Path, reporter: Reporter) -> None:
        """Measure a version, if anything of that may leave, and tell what may."""
        about = {"run": task.run, "round": task.number}
        self._say("task", about | {"rounds": task.rounds, "steps": 0})
        exam = folder / "exam.json"
        if self._config.policy.tells and not exam.exists():
            self._work_on(task, folder, reporter)
        reporter.measured(exam.read_text() if exam.exists() else "")
        self._say("measured", about)
        self._work.clear(task)

    def _approve(self, task: TaskSpec, reporter: Reporter) -> None:
        """Wait for a person here, where the policy wants one; raises RefusedError if they say no."""
        wish = request(task, self._config.policy, asked_by=self._channel.target)
        if wish is None:
            return
        about = {"run": task.run, "round": task.number, "request": wish.id}
        standing = self._approvals.ask(wish)
        if standing.state == "pending":
            self._say("approval", {**about, "state": "pending", "show": f"offsite site pending {self._work.path}"})
            reporter.now(pb.AWAITING_APPROVAL)
        while standing.state == "pending":
            if reporter.stopped:
                raise Stopped
            time.sleep(LOOK_S)
            standing = self._approvals.ask(wish)
        self._say("approval", {**about, "state": standing.state, "by": standing.by, "why": standing.why})
        if standing.state == "rejected":
            raise refusal("approve", f"{standing.by} has rejected it" + (f": {standing.why}" if standing.why else ""))

    def _train(self, task: TaskSpec, folder: Path, reporter: Reporter) -> None:
        transfer = self._work_on(task, folder, reporter)
        metrics = from_json(UpdateMetrics, (folder / "metrics.json").read_text(), where="metrics")
        spans = (transfer, *metrics.spans) if reporter.bytes_down else metrics.spans
        partial = folder / "metrics.partial"
        partial.write_bytes(to_json(UpdateMetrics(**{**vars(metrics), "spans": spans})))
        partial.replace(folder / "metrics.json")

    def _work_on(self, task: TaskSpec, folder: Path, reporter: Reporter) -> Span:
        """Have a trainer do a task; return when what it needs was downloaded."""
        if not self._config.engine.launcher:
            self._trainers.start()  # it imports while the bundle comes
        start = time.time()
        manifest, bundle, adapter = self._fetch(task, reporter)
        transfer = Span(kind="transfer", start=start, end=max(start, time.time()))
        reporter.now(pb.LOADING)
        job = TrainerJob(
            bundle=str(bundle),
            manifest=manifest,
            adapter=str(adapter),
            anchor=str(self._work.anchor(task) or ""),
            data=str(self._config.data.resolve()),
            policy=self._config.policy,
            task=task,
            engine=replace(
                self._config.engine, micro_batch=self._config.engine.micro_batch or self._work.micro_batch(task)
            ),
            secret=str(self._work.secret.resolve()),
            residual="" if task.examines else self._residual(task),
            reservoirs=tuple(map(str, self._work.reservoirs(task))),
            out=str(folder),
        )
        if reporter.stopped:
            raise Stopped
        self._perform(job, folder, reporter)
        return transfer

    def _perform(self, job: TrainerJob, folder: Path, reporter: Reporter) -> None:
        """Have a job done: where the site leaves it to us, anew with half as many rows at once if memory runs out.

        By new processes: whichever of them ran out, and wherever the others wait for it, nothing of the step is left.
        """
        while True:
            try:
                return self._follow(job, folder, reporter)
            except ResourceError as error:
                engine = job.engine.halved(job.task.training.batch_size)
                if error.reason != "FAULT_MEMORY" or self._config.engine.micro_batch or engine is None:
                    raise
            job = replace(job, engine=engine)
            self._work.keep_micro_batch(job.task, engine.micro_batch)
            what = f"memory ran out; the round begins anew with {engine.micro_batch} sequences in work at once"
            self._say("warning", {"message": what})

    def _follow(self, job: TrainerJob, folder: Path, reporter: Reporter) -> None:
        """Start the processes of a job and say how it goes until they are done."""
        task = job.task
        trainer = launch(job, folder, self._trainers)
        reporter.on_stop(trainer.stop)
        try:
            for event in trainer.events():
                if event["event"] == "step":
                    reporter.now(pb.TRAINING, step=event["step"], steps=event["steps"], **self._open(event, folder))
                    self._say("step", {"round": task.number, **{k: event[k] for k in ("step", "steps", "loss")}})
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

    def _open(self, event: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return what may leave of a step."""
        policy = self._config.policy
        about: dict[str, Any] = {"loss": event["loss"]} if policy.per_step_metrics else {}
        about |= {"usage": pb.Usage(**event["usage"])} if policy.usage else {}
        return about | {"lines": self._lines(folder)}

    def _lines(self, folder: Path) -> list[str]:
        """Return the last lines of the first trainer's log, where they may leave."""
        log = folder / "rank-0.log"
        return last(log).splitlines()[-LINES:] if self._config.policy.logs and log.exists() else []

    def _residual(self, task: TaskSpec) -> str:
        """Return the file of what stages left out of this site's newest update that the run has; empty: nothing."""
        self._work.clear_residuals(task)
        if task.previous is None:
            return ""
        file = self._work.residual(task, task.previous)
        if not file.exists():
            what = f"what was left out of this site's last update in run {task.run} is gone, and is not sent later"
            self._say("warning", {"message": what})
            return ""
        return str(file.resolve())

    def _say_judged(self, task: TaskSpec, event: dict[str, Any]) -> None:
        """Say what the trainer found of the data or of the emulator before it trains."""
        findings = {key: value for key, value in event.items() if key not in ("event", "warnings")}
        self._say(event["event"], {"round": task.number, **findings})
        for warning in event["warnings"]:
            self._say("warning", {"message": warning})

    def _fetch(self, task: TaskSpec, reporter: Reporter) -> tuple[Manifest, Path, Path]:
        """Download what is missing of the bundle, the adapter and what training is held to.

        Returns the manifest, and where the first two are.
        """
        reporter.now(pb.DOWNLOADING)
        bundle = self._work.bundle(task)
        document = bundle.with_suffix(".json")
        self._get(task.manifest, document, task.manifest_size, reporter)
        manifest = from_json(Manifest, document.read_bytes(), where="manifest")
        self._config.policy.check_bundle(task, manifest)
        adapter = self._work.adapter(task)
        files = [(entry.digest, bundle / entry.path, entry.size) for entry in manifest.files]
        files.append((task.adapter, adapter, task.adapter_size))
        if task.anchor and (anchor := self._work.anchor(task)):
            files.append((task.anchor, anchor, task.anchor_size))
        all_of((partial(self._get, *file, reporter) for file in files), most=FILES)
        return manifest, bundle, adapter

    def _get(self, digest: str, path: Path, size: int, reporter: Reporter) -> None:
        with because("FAULT_TRANSFER", MismatchError, NotFoundError):
            earlier = self._work.earlier(path)
            self._channel.download(
                self._fleet.Download, digest, path, size=size, earlier=earlier, progress=reporter.count
            )
        if reporter.stopped:
            raise Stopped


def policy_digest(path: Path) -> str:
    """Digest of a policy file, told to the coordinator for the record."""
    return digest_bytes(path.read_bytes())
