"""The SDK: submit a run, watch it, wait for it, take what it gave.

from offsite.client import RunSpec, connect

with connect("coordinator:8443", identity="kits/alice") as session:
    run = session.submit(RunSpec(model="smollm2-135m-instruct", rounds=2, public="/data/public.jsonl"))
    for event in run.watch():
        print(event)
    run.result("outcome")
"""

import logging
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic_core import from_json

from offsite.client.answers import Artifact, Event, Site, Status, Version, copied, event_of, numbered, version_of
from offsite.client.channel import Channel
from offsite.client.forgetting import Forgetting, forgetting
from offsite.client.membership import Renewal
from offsite.protos import runs_pb2 as pb
from offsite.protos import runs_pb2_grpc
from offsite.protos.documents import from_json as read_json
from offsite.protos.documents import parse, plain, to_json, to_plain
from offsite.protos.errors import InputError, MismatchError, RefusedError, RunError, UnreachableError
from offsite.protos.figures import PLUG_IN
from offsite.protos.security.certificates import PEOPLE
from offsite.protos.security.identity import Identity
from offsite.protos.spec import RunSpec

log = logging.getLogger(__name__)

CARD = "README.md"  # which the people of model hubs read
RENEWAL_S = 2.0  # how long one who connects waits for an authority to renew a certificate
RESTART_S = 600.0  # how long one who waits for a run waits for a coordinator that is being restarted


class Run:
    """A submitted run."""

    def __init__(self, session: "Session", reply: pb.RunStatus) -> None:
        self._session = session
        self._reply = reply

    @property
    def id(self) -> str:
        """The run's id."""
        return self._reply.id

    @property
    def state(self) -> str:
        """queued, waiting, running, completed, failed or cancelled, as last seen."""
        return self._reply.state

    @property
    def error(self) -> str:
        """Why it failed, as last seen."""
        return self._reply.error

    @property
    def note(self) -> str:
        """What it waits for, as last seen; empty while it goes on."""
        return self._reply.note

    @property
    def spec(self) -> RunSpec:
        """What was submitted, with all defaults filled in."""
        if not self._reply.spec:  # of a list, which is brief
            self.refresh()
        return read_json(RunSpec, self._reply.spec, where="run spec")

    @property
    def status(self) -> Status:
        """How it stands, as last seen."""
        artifacts = tuple(copied(Artifact, artifact) for artifact in self._reply.artifacts)
        return copied(Status, self._reply, artifacts=artifacts)

    def refresh(self) -> Self:
        """Ask the coordinator again."""
        self._reply = self._session.call("Get", pb.RunId(id=self.id))
        return self

    def watch(self, *, after: int = 0, patience_s: float = RESTART_S) -> Iterator[Event]:
        """Yield the run's events after a sequence number until it ends.

        The run goes on without its watchers, and a coordinator that is restarted has all events: for `patience_s`
        this waits for it, says so in the log, and goes on after the last event it yielded.
        """
        ended = False
        while not ended:
            try:
                for some in self._session.stream("Watch", pb.WatchRequest(id=self.id, after=after)):
                    for event in some.events:
                        after = event.seq
                        yield event_of(event)
                ended = True
            except UnreachableError as error:
                log.warning("%s; the run goes on, waiting for the coordinator", plain(str(error)))
                self._reply = self._session.call("Get", pb.RunId(id=self.id), patience_s=patience_s)
                log.warning("the coordinator is back; going on after event %d", after)
        self.refresh()

    def events(self, *, after: int = 0) -> list[Event]:
        """Return the run's events so far, those after a sequence number."""
        parts = self._session.stream("Watch", pb.WatchRequest(id=self.id, after=after, past=True))
        return [event_of(event) for some in parts for event in some.events]

    def wait(self) -> Self:
        """Return when the run is completed; raises RunError if it failed or was cancelled."""
        for _ in self.watch():
            pass
        if self.state != "completed":
            raise RunError(f"run {self.id} {self.state}: {self.error}")
        return self

    def log_to(self, *targets: str) -> Self:
        """Write the run's figures to `tensorboard:DIR`, `mlflow:URI` or `otlp:URL` until it ends, and return it.

        Raises InputError for another target, ResourceError where the extra that it needs is not installed.
        """
        from offsite.client.loggers import logged

        for _ in logged(self, self.watch(), targets):
            pass
        return self

    def cancel(self) -> Self:
        """End the run; sites stop at their next report."""
        self._reply = self._session.call("Cancel", pb.RunId(id=self.id))
        return self

    def extend(self, rounds: int, *, after: int = 0, token: str = "") -> "Run":
        """Submit a run of so many more rounds, and return it: it ends with the bytes of a run of that length.

        It goes on from the version of the round `after`, counted from one, or from the newest that stands, with the
        sites of that round, and does not stop early. The same token gives the same run. Raises ConflictError while this
        run is at work, and InputError where it cannot have these bytes.
        """
        request = pb.ExtendRequest(token=token or secrets.token_hex(16), run=self.id, round=after, rounds=rounds)
        return Run(self._session, self._session.call("Extend", request))

    def eject(self, site: str, *, reason: str) -> Self:
        """Take a site out of the run, which goes on; the reason stays in its audit trail."""
        self._reply = self._session.call("Eject", pb.EjectRequest(run=self.id, site=site, reason=reason))
        return self

    def withdraw(self, site: str, *, reason: str) -> "Run":
        """Take a site out of this run, which is over, and return the run that does it again without the site.

        All versions that hold its work are taken back, here and in runs that went on from them, and their files are
        published no longer. The new run publishes what changed, signed by the owner (`withdrawal/certificate.json`).
        Done again, it gives the same run. Raises NotFoundError for a site that gave no update, ConflictError while a
        run works on what holds its work, InputError where the outcome would not be that of a run without it.
        """
        request = pb.WithdrawRequest(run=self.id, site=site, reason=reason)
        return Run(self._session, self._session.call("Withdraw", request))

    @property
    def report(self) -> dict[str, Any]:
        """The figures of a completed run; empty before."""
        try:
            report = from_json(self._reply.report or "{}", allow_inf_nan=False)
        except ValueError:
            report = None
        if not isinstance(report, dict):
            raise MismatchError(f"the report of run {self.id} is not a JSON table")
        return report

    @property
    def card(self) -> str:
        """A model card of a completed run in Markdown, to be completed by its owner."""
        from offsite.client.card import card  # brings rich

        return card(self.report, {artifact.name: artifact.digest for artifact in self.status.artifacts})

    def result(self, folder: str | Path) -> Path:
        """Wait for the run and download its files into a folder: `adapter/` in peft format, `merged/` if asked for.

        A model card is written beside them, README.md, unless there is a file of that name.
        """
        self.wait()
        against = [f"{one['check']}: {one['reason']}" for one in self.report.get("gate", ()) if not one["holds"]]
        if against and not self.status.artifacts:
            raise RefusedError(f"run {self.id} is held back by its gate ({plain('; '.join(against))}); ask the owner")
        folder = Path(folder).expanduser()
        for artifact in self.status.artifacts:
            relative = Path(artifact.name)
            if relative.is_absolute() or ".." in relative.parts:
                raise InputError(f"the coordinator named a file outside the folder: {artifact.name!r}")
            self._session.download(artifact.digest, folder / relative)
        if not (folder / CARD).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CARD).write_text(self.card, encoding="utf-8")
        return folder


class Session:
    """An open coordinator; a context manager. One that stays open for days does so `with session.renewal:`."""

    def __init__(self, channel: Channel, renewal: Renewal) -> None:
        self._channel = channel
        self.renewal = renewal
        self._runs = runs_pb2_grpc.RunsStub(channel.grpc)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> Identity:
        """Who speaks here: name and role are those of the certificate."""
        return self.renewal.identity

    @property
    def target(self) -> str:
        """HOST:PORT of the coordinator, or of the gateway to it that is spoken to."""
        return self._channel.target

    def close(self) -> None:
        """Close the connection; runs go on."""
        self._channel.close()

    def call(self, name: str, request: Any, *, patience_s: float | None = None) -> Any:
        """Make one call of the Runs service, for `patience_s` trying while the coordinator is away."""
        return self._channel.call(getattr(self._runs, name), request, patience_s=patience_s)

    def stream(self, name: str, request: Any) -> Iterator[Any]:
        """Make one streaming call of the Runs service."""
        return self._channel.stream(getattr(self._runs, name), request)

    def download(self, digest: str, path: Path) -> int:
        """Fetch one published file."""
        return self._channel.download(self._runs.Fetch, digest, path)

    def submit(self, spec: RunSpec, *, token: str = "", start: "Run | str | None" = None) -> Run:
        """Submit a run. The same token with the same spec gives the same run, so a submission may be repeated.

        It goes on from `start`, a run that is completed, or "RUN:ROUND" for a round that is done, if one is given.
        """
        if start is not None:
            named = start.id if isinstance(start, Run) else start
            spec = parse(RunSpec, to_plain(spec) | {"start": named}, where="run")
        request = pb.SubmitRequest(token=token or secrets.token_hex(16), spec=to_json(spec))
        return Run(self, self.call("Submit", request))

    def run(self, id: str) -> Run:
        """Return a run by id; raises NotFoundError."""
        return Run(self, self.call("Get", pb.RunId(id=id)))

    def runs(self, *, limit: int | None = None) -> list[Run]:
        """Return all runs, or the newest `limit` ones, oldest first; each in brief until it is refreshed."""
        runs: list[Run] = []
        more = limit is None or limit > 0
        while more:
            left = 0 if limit is None else limit - len(runs)
            before = runs[-1].id if runs else ""
            page = self.call("List", pb.ListRequest(limit=left, before=before))
            runs += [Run(self, reply) for reply in page.runs]
            more = page.more and bool(page.runs) and (limit is None or len(runs) < limit)
        return runs[::-1]

    def versions(self, run: Run | str | None = None, *, limit: int = 0) -> list[Version]:
        """Return the versions of a run, after those that it went on from, oldest first; raises NotFoundError.

        Without a run it is the newest version that stands of each of the newest runs, or of the newest `limit` ones.
        """
        named = run.id if isinstance(run, Run) else run or ""
        reply = self.call("Versions", pb.VersionsRequest(run=named, limit=limit))
        return [version_of(message) for message in reply.versions]

    def roll_back(self, version: Version | str, *, reason: str) -> list[Version]:
        """Take back all that came after a version, "RUN:ROUND", in its run and in those that went on from there.

        What was taken back stays, but no run begins from it, and `start` names the newest version of a run that stands.
        Returns the versions of the run, as `versions` does. Raises NotFoundError, InputError for a version that was
        taken back itself, ConflictError while a run works on what came after it.
        """
        run, number = numbered(version.id if isinstance(version, Version) else version)
        if not number:
            raise InputError(f"{version}: expected RUN:ROUND, such as {run or 'a1b2c3d4'}:2, the last to stay")
        reply = self.call("RollBack", pb.RollBackRequest(run=run, round=number, reason=reason))
        return [version_of(message) for message in reply.versions]

    def release(self, version: Version | str, *, reason: str) -> list[Version]:
        """Let out what a run's gate held back: "RUN:ROUND", a version, or "RUN", all of the run; it is for the owner.

        Who did it and why stays in the run's events. Returns the versions of the run, as `versions` does. Raises
        NotFoundError, InputError without a reason, ConflictError where nothing is held back.
        """
        run, number = numbered(version.id if isinstance(version, Version) else version)
        reply = self.call("Release", pb.ReleaseRequest(run=run, round=number, reason=reason))
        return [version_of(message) for message in reply.versions]

    def forgetting(self, run: Run | str) -> Forgetting:
        """Return what the runs that led to a run, and itself, have learned and forgotten of their tasks.

        A run that another went on from before its end counts with what was measured after that round, where its
        `evaluate_every` asked for that, and else with the base's figures alone. Raises NotFoundError, and InputError
        where no run says which task it learned, or was measured on none.
        """
        last = {version.run: version for version in self.versions(run)}
        reports = []
        for id, version in last.items():
            report = self.run(id).report
            if not report:
                raise InputError(f"run {id} has no report yet; wait for its end")
            sets = report["rounds"][version.round - 1].get("sets", {})
            if sets or version.round < len(report["rounds"]):  # else an earlier version wrote it
                report["sites"] = {name: row | {PLUG_IN: sets.get(name)} for name, row in report["sites"].items()}
            reports.append(report)
        return forgetting(reports, kept={id: version.kept for id, version in last.items()})

    def sites(self) -> list[Site]:
        """Return the enrolled sites, by name."""
        return [copied(Site, site) for site in self.call("Sites", pb.SitesRequest()).sites]


def connect(address: str, *, identity: str | Path, patience_s: float = 10.0) -> Session:
    """Open a coordinator at HOST:PORT with the kit of an owner, a researcher or an auditor.

    Several of its gateways, as "HOST:PORT,HOST:PORT", are tried in turn.

    Raises:
        IdentityError: the kit is broken, expired, or of another authority.
        InputError: the address is not HOST:PORT.
    """
    kit = Identity.load(Path(identity).expanduser(), expect=PEOPLE)
    if kit.warning:
        log.warning(kit.warning)
    channel = Channel(address, kit, patience_s=patience_s)
    renewal = Renewal(channel, kit, say=log.warning)
    if datetime.now(UTC) >= kit.renewal:
        renewal.look(wait_s=RENEWAL_S)
    return Session(channel, renewal)
