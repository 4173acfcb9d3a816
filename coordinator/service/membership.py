"""What one calls to get a certificate, or the list of those that hold; it signs nothing itself."""

import asyncio
from pathlib import Path
from typing import Any

from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.threads import in_thread
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.memberships import Decision
from offsite.protos import membership_pb2 as pb
from offsite.protos import membership_pb2_grpc
from offsite.protos.documents import plain
from offsite.protos.errors import RefusedError
from offsite.protos.security.certificates import MEMBERS, Peer
from offsite.protos.security.revocation import RevocationList, Revocations
from offsite.protos.security.signing_requests import fingerprint, requested_key

LONGEST_S = 30.0  # of one wait for the authority
BATCH = 256  # requests that an authority elsewhere is given at once


class MembershipService(membership_pb2_grpc.MembershipServicer):
    """The Membership service: a request is written into the journal, and answered once it has an answer there."""

    def __init__(
        self, journal: Journal, gate: Gate, changes: Changes, revocations: Revocations, *, authority: bytes
    ) -> None:
        """Take the list of the certificates that hold, and the authority (PEM) that signs it."""
        self._journal, self._gate, self._changes = journal, gate, changes
        self._revocations, self._authority = revocations, authority

    async def Join(self, request: pb.SigningRequest, context: Any) -> pb.SigningReply:
        """Answer the holder of a token."""
        async with self._gate(context, "joining", request=request) as caller:
            return await self._ask(caller, request)

    async def Renew(self, request: pb.SigningRequest, context: Any) -> pb.SigningReply:
        """Answer a site or a person whose certificate holds."""
        async with self._gate(context, *MEMBERS, request=request) as caller:
            return await self._ask(caller, request)

    async def Revocations(self, request: pb.RevocationsRequest, context: Any) -> pb.RevocationsReply:
        """Answer with the list, if it is newer than the caller's."""
        async with self._gate(context, *MEMBERS, request=request):
            newest = self._revocations.newest()
            return pb.RevocationsReply(revocations=newest.pem if newest.number > request.number else b"")

    async def Unsigned(self, request: pb.UnsignedRequest, context: Any) -> pb.UnsignedReply:
        """Answer with requests that nobody has signed."""
        async with self._gate(context, "owner", request=request):
            rows = await in_thread(self._journal.unsigned, most=BATCH)
            return pb.UnsignedReply(
                requests=[pb.Unsigned(caller=row.caller, key=row.key, request=row.request) for row in rows]
            )

    async def Sign(self, request: pb.SignRequest, context: Any) -> pb.SignReply:
        """Record what the owner's authority answered elsewhere."""
        async with self._gate(context, "owner", request=request):
            newest = RevocationList.parse(request.revocations, self._authority, where=Path("the list sent"))
            decisions = [
                Decision(plain(one.caller), plain(one.key), one.certificate, plain(one.refusal))
                for one in request.answers[:BATCH]
            ]
            await in_thread(self._journal.decide, decisions, number=newest.number, pem=newest.pem)
            return pb.SignReply()

    async def _ask(self, caller: Peer, request: pb.SigningRequest) -> pb.SigningReply:
        serial, key = f"{caller.serial:x}", fingerprint(requested_key(request.request))
        await in_thread(self._journal.ask, serial, key, request.request)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(request.wait_s, LONGEST_S)
        while True:
            number = self._changes.number
            row = await in_thread(self._journal.asked, serial, key)
            if row.state == "refused":
                raise RefusedError(row.refusal)
            left = deadline - loop.time()
            if row.state == "signed" or left <= 0:
                pem = await in_thread(self._journal.list_pem)
                return pb.SigningReply(certificate=row.certificate, revocations=pem)
            await self._changes.after(number, timeout_s=left)
