"""What people call: submit, look, cancel, fetch."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs import continuing, lineage, outs, releasing
from offsite.coordinator.runs.grant import Grant, Replay
from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.threads import in_thread
from offsite.coordinator.service.transfers import send
from offsite.coordinator.service.versions import reply
from offsite.coordinator.store import Unusable
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.journal import Journal, Row, no_run
from offsite.protos import runs_pb2 as pb
from offsite.protos import runs_pb2_grpc, transfer_pb2
from offsite.protos.documents import from_json, plain, to_json, to_plain
from offsite.protos.errors import NotFoundError, OffsiteError, RefusedError
from offsite.protos.events import Cancelled
from offsite.protos.figures import without_infinities
from offsite.protos.security.certificates import PEOPLE
from offsite.protos.security.tls import Peer
from offsite.protos.spec import RunSpec

RECHECK_S = 2.0  # one who watches a run in which nothing happens
HEADS = 50  # runs of whose newest version one list tells, each of which is read whole
REASON = 200  # characters of what a person gives as a reason
PAGE = 500  # runs of one list, whose errors are sentences
AHEAD = 1000  # events of a run that are read at once for one who watches it


def _judge(grant: Grant, journal: Journal, blobs: Blobs) -> None:
    """Import what judges in the thread that judges: it brings torch, and sites need not wait for that to enrol."""
    from offsite.coordinator.runs.legality import beginning, judge, leaves, tiers

    try:
        judge(grant, folders=grant.folders, whole=grant.whole)
        continuing.judge(journal, blobs, grant, tiers=tiers(grant), begins=beginning(grant), leaves=leaves)
    except OffsiteError as error:
        raise type(error)(grant.wording(error)) from None


def _extension(journal: Journal, request: pb.ExtendRequest) -> RunSpec:
    """Import what makes it in the thread that does: it brings torch."""
    from offsite.coordinator.runs.extending import extension

    return extension(journal, request.run, rounds=request.rounds, number=request.round)


def _again(journal: Journal, request: pb.WithdrawRequest, by: str) -> tuple[RunSpec, Replay]:
    """Import what makes it in the thread that does: it brings torch."""
    from offsite.coordinator.runs.withdrawing import again

    return again(journal, request.run, request.site, by=by, reason=request.reason)


def _take_back(journal: Journal, replays: Replay) -> None:
    from offsite.coordinator.runs.withdrawing import take_back

    take_back(journal, replays)


class RunsService(runs_pb2_grpc.RunsServicer):
    """The Runs service. A researcher's runs are theirs: for other researchers they do not exist."""

    def __init__(self, journal: Journal, blobs: Blobs, gate: Gate, changes: Changes, *, policy: OwnerPolicy) -> None:
        self._journal, self._blobs, self._gate, self._changes = journal, blobs, gate, changes
        self._policy = policy

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.RunStatus:
        """Check the spec and make the run durable; whoever dispatches finds it there."""
        async with self._gate(context, "owner", "researcher", request=request) as person:
            return await self._submit(from_json(RunSpec, request.spec, where="run spec"), request.token, person)

    async def _submit(self, spec: RunSpec, token: str, person: Peer, *, replays: Replay | None = None) -> pb.RunStatus:
        run = secrets.token_hex(4)
        token = f"{person.name} {token or run}"  # one person's token is nobody else's
        granted = None
        if not await in_thread(self._journal.submitted, token):
            grant = await asyncio.to_thread(self._grant, spec, person)
            await asyncio.to_thread(_judge, grant, self._journal, self._blobs)
            grant = await in_thread(self._grant, spec, person)  # others of theirs may have come in
            granted = to_plain(replace(grant, replays=replays))
        row = await in_thread(
            self._journal.add_run, run, token=token, owner=person.name, spec=to_json(spec), granted=granted
        )
        return await in_thread(self._status, row.id, person)  # of the first submission with the token

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.RunStatus:
        """Submit a run of more rounds."""
        async with self._gate(context, "owner", "researcher", request=request) as person:
            await in_thread(self._seen, request.run, person)
            spec = await asyncio.to_thread(_extension, self._journal, request)
            return await self._submit(spec, request.token, person)

    async def Withdraw(self, request: pb.WithdrawRequest, context: Any) -> pb.RunStatus:
        """Do a run again without a site, and take back what held the work of that."""
        async with self._gate(context, "owner", "researcher", request=request) as person:
            await in_thread(self._check_later, request.run, 0, person)
            spec, replays = await asyncio.to_thread(_again, self._journal, request, person.name)
            token = f"withdraw {request.run} {request.site}"
            run = await self._submit(spec, token, person, replays=replays)
            replays = await in_thread(lambda: continuing.granted(self._journal, run.id).replays or replays)  # the first
            await asyncio.to_thread(_take_back, self._journal, replays)
            return run

    async def Get(self, request: pb.RunId, context: Any) -> pb.RunStatus:
        """Return one run."""
        async with self._gate(context, *PEOPLE, request=request) as person:
            return await in_thread(self._status, request.id, person)

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListReply:
        """Return a page of runs, newest first and in brief."""
        async with self._gate(context, *PEOPLE, request=request) as person:
            return await in_thread(self._page, request, person)

    def _page(self, request: pb.ListRequest, person: Peer) -> pb.ListReply:
        limit = min(request.limit or PAGE, PAGE)
        if request.before:
            self._seen(request.before, person)
        owner = person.name if person.role == "researcher" else None
        rows = self._journal.page(limit=limit + 1, before=request.before, owner=owner)
        done = self._journal.rounds_done(row.id for row in rows[:limit])
        return pb.ListReply(runs=[_brief(row, done.get(row.id, 0)) for row in rows[:limit]], more=len(rows) > limit)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Events]:
        """Stream events, as many at once as there are, until the run is over, or those that there are."""
        async with self._gate(context, *PEOPLE, request=request) as person:
            await in_thread(self._seen, request.id, person)
            after, more = request.after, True
            while more:
                events: list[pb.Event] = []
                number = self._changes.number  # before the look: what is written after it makes it another one
                with (
                    nullcontext() if request.past else suppress(Unusable)
                ):  # who watches waits for the journal, as the run does
                    more, events = await in_thread(self._news, request.id, after)
                if events:
                    after = events[-1].seq
                    yield pb.Events(events=events)
                more = more and not (request.past and len(events) < AHEAD)
                if more and len(events) < AHEAD:
                    await self._changes.after(number, timeout_s=RECHECK_S)
                if more:
                    self._gate.recheck(person)

    def _news(self, run: str, after: int) -> tuple[bool, list[pb.Event]]:
        """Return whether there may be more, and the next events of a run after one."""
        live = self._journal.is_live(run)  # before the events: none written at the end is missed
        events = [
            pb.Event(seq=row.seq, at=row.at, kind=row.kind, round=row.round, site=row.site, data=_json(row.data))
            for row in self._journal.events(run, after=after, most=AHEAD)
        ]
        return live or len(events) == AHEAD, events

    async def Cancel(self, request: pb.RunId, context: Any) -> pb.RunStatus:
        """End a run; one that is over stays as it ended."""
        async with self._gate(context, "owner", "researcher", request=request) as person:
            await in_thread(self._seen, request.id, person)
            await in_thread(self._journal.end_run, request.id, Cancelled(error=f"cancelled by {person.name}"))
            return await in_thread(self._status, request.id, person)

    async def Eject(self, request: pb.EjectRequest, context: Any) -> pb.RunStatus:
        """Take a site out of a run, which goes on."""
        async with self._gate(context, "owner", "researcher", request=request) as person:
            await in_thread(self._seen, request.run, person)
            reason = plain(request.reason, most=REASON)
            await in_thread(
                partial(outs.eject, self._journal, request.run, request.site, by=person.name, reason=reason)
            )
            return await in_thread(self._status, request.run, person)

    async def Fetch(self, request: transfer_pb2.DownloadRequest, context: Any) -> None:
        """Send a published file of a run of the caller's, if the policy lets them have it; nothing else can be had."""
        async with self._gate(context, "owner", "researcher", request=request, transfer=True) as person:
            published = await in_thread(self._journal.publications, request.digest)
            seen = [row for row in published if person.role == "owner" or row.owner == person.name]
            if not seen:
                raise NotFoundError(f"{plain(request.digest)} is not a published file")
            if not any(self._policy.may_fetch(row.name, role=person.role, person=person.name) for row in seen):
                raise RefusedError("the owner's policy (merged) does not let you have a merged model; ask the owner")
            await send(self._blobs, request, context, self._gate.rechecks(person), self._gate.meter.sent)

    async def Sites(self, request: pb.SitesRequest, context: Any) -> pb.SitesReply:
        """Return the enrolled sites."""
        async with self._gate(context, *PEOPLE, request=request):
            rows = await in_thread(self._journal.sites)
            return pb.SitesReply(
                sites=[pb.Site(name=r.name, seen_at=r.seen_at, examples=r.examples, version=r.version) for r in rows]
            )

    async def Versions(self, request: pb.VersionsRequest, context: Any) -> pb.VersionsReply:
        """Return the lineage of a run, or the newest version of each of the newest runs."""
        async with self._gate(context, *PEOPLE, request=request) as person:
            return await in_thread(self._versions, request, person)

    async def RollBack(self, request: pb.RollBackRequest, context: Any) -> pb.VersionsReply:
        """Take back what came after a version, and return the lineage of its run."""
        async with self._gate(context, "owner", "researcher", request=request) as person:
            await in_thread(self._roll_back, request, person)
            return await in_thread(self._versions, pb.VersionsRequest(run=request.run), person)

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.VersionsReply:
        """Let out what a gate held back, and return the lineage of its run; it is for the owner."""
        async with self._gate(context, "owner", request=request) as person:
            how = {"by": person.name, "reason": request.reason}
            await in_thread(partial(releasing.let_out, self._journal, request.run, request.round, **how))
            return await in_thread(self._versions, pb.VersionsRequest(run=request.run), person)

    def _versions(self, request: pb.VersionsRequest, person: Peer) -> pb.VersionsReply:
        if request.run:
            self._seen(request.run, person)
            return reply(lineage.lineage(self._journal, request.run), self._blobs)
        owner = person.name if person.role == "researcher" else None
        rows = self._journal.page(limit=min(request.limit or HEADS, HEADS), owner=owner)
        heads = [lineage.newest(self._journal, row.id) for row in reversed(rows)]
        return reply((head for head in heads if head), self._blobs)

    def _roll_back(self, request: pb.RollBackRequest, person: Peer) -> None:
        self._check_later(request.run, request.round, person)
        lineage.roll_back(self._journal, request.run, request.round, by=person.name, reason=request.reason)

    def _check_later(self, run: str, number: int, person: Peer) -> None:
        """Raise for a run that is not a person's, or of which others have gone on from what came after a round."""
        for one in (run, *lineage.later(self._journal, run, number)):
            if not self._is_theirs(self._journal.run(one), person):
                if one == run:
                    raise no_run(run)
                raise RefusedError(f"the owner went on from what came after {run}:{number}; ask the owner")

    def _grant(self, spec: RunSpec, person: Peer) -> Grant:
        live = self._journal.live_of(person.name)
        continues = None
        if spec.start:
            self._seen(spec.start.partition(":")[0], person)
            continues = continuing.ancestor(self._journal, spec.start)
        grant = self._policy.grant(spec, role=person.role, person=person.name, live=live, continues=continues)
        if not spec.known_by:
            return grant
        from offsite.coordinator.runs import knowing  # brings torch, too

        self._seen(spec.known_by.partition(":")[0], person)
        return replace(grant, known=knowing.known(self._journal, spec, continues))

    def _seen(self, run: str, person: Peer) -> Row:
        """Return a run that a person may see; for others' runs the error is that of one that does not exist."""
        row = self._journal.run(run)
        if not self._is_theirs(row, person):
            raise no_run(run)
        return row

    @staticmethod
    def _is_theirs(row: Row, person: Peer) -> bool:
        return person.role != "researcher" or bool(row.owner == person.name)

    def _status(self, run: str, person: Peer) -> pb.RunStatus:
        row = self._seen(run, person)
        status = _brief(row, self._journal.rounds_done([row.id]).get(row.id, 0))
        files = [
            file
            for file in self._journal.artifacts(row.id)
            if person.role == "auditor" or self._policy.may_fetch(file.name, role=person.role, person=person.name)
        ]
        whole = pb.RunStatus(
            error=row.error,
            spec=row.spec,
            report=row.report,
            artifacts=[pb.Artifact(name=file.name, digest=file.digest, size=file.size) for file in files],
        )
        status.MergeFrom(whole)
        return status


def _json(value: Any) -> str:
    return json.dumps(without_infinities(value)[0], allow_nan=False)


def _brief(row: Row, done: int) -> pb.RunStatus:
    """What a list shows of a run."""
    return pb.RunStatus(
        id=row.id,
        name=plain(row.name, most=200),
        state=row.state,
        round=done,
        rounds=row.rounds,
        error=plain(row.error, most=500),
        note=plain(row.note, most=500),
        submitted_at=row.submitted_at,
        finished_at=row.finished_at,
        owner=row.owner,
    )
