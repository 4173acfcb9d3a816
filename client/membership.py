"""A certificate asked for, and kept up to date: private keys stay in the kit, what travels is a signing request.

The key that a certificate is asked for is kept until it has one, so who was killed and asks again is answered alike.
"""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from offsite.client.channel import Channel
from offsite.protos import membership_pb2 as pb
from offsite.protos import membership_pb2_grpc
from offsite.protos.errors import IdentityError, OffsiteError, UnreachableError, from_system
from offsite.protos.security.identity import Identity
from offsite.protos.security.kit import next_key, private, replace_pair
from offsite.protos.security.revocation import list_number, replace_list
from offsite.protos.security.signing_requests import new_request

ASK_S = 20.0  # one wait for the authority
RENEW_S = 60.0  # between two looks whether a certificate is to be renewed
LIST_S = 3600.0  # between two looks for a newer list of certificates
Say = Callable[[str], None]


class Membership:
    """Asks a coordinator for a certificate of a kit's next key."""

    def __init__(self, channel: Channel, kit: Path) -> None:
        self._channel, self._kit = channel, kit
        self._calls = membership_pb2_grpc.MembershipStub(channel.grpc)  # type: ignore[no-untyped-call]

    def join(self, *, wait_s: float) -> pb.SigningReply:
        """Ask with a token's identity; the reply has no certificate where nobody signs for so long."""
        return self._ask(self._calls.Join, wait_s)

    def renew(self, *, wait_s: float) -> pb.SigningReply:
        """Ask with the certificate before."""
        return self._ask(self._calls.Renew, wait_s)

    def _ask(self, method: Any, wait_s: float) -> pb.SigningReply:
        request = pb.SigningRequest(request=new_request(next_key(self._kit)), wait_s=wait_s)
        reply: pb.SigningReply = self._channel.call(method, request, timeout_s=wait_s + ASK_S)
        return reply

    def revocations(self, number: int) -> bytes:
        """Return the list of certificates if there is one with a higher number."""
        reply = self._channel.call(self._calls.Revocations, pb.RevocationsRequest(number=number))
        return bytes(reply.revocations)


class Renewal:
    """Keeps a kit up to date, and has its channel show the newest certificate: calls in progress go on with theirs.

    A context manager, which looks now and then in a thread of its own.
    """

    def __init__(self, channel: Channel, identity: Identity, *, say: Say) -> None:
        """Take the channel that shows the kit's certificate, and who is told what hinders."""
        self._channel, self.identity, self._say = channel, identity, say
        self._membership = Membership(channel, identity.folder)
        self._listed, self._hindrance = float("-inf"), ""
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._work, daemon=True, name="renewal").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.is_set():
            self.look()
            self._closed.wait(RENEW_S)

    def look(self, *, wait_s: float = ASK_S) -> None:
        """Renew the certificate if it is time, and the list; what hinders is said once, and tried again."""
        try:
            if datetime.now(UTC) >= self.identity.renewal:
                self.renew(wait_s=wait_s)
            if time.monotonic() - self._listed > LIST_S:
                self.refresh()
                self._listed = time.monotonic()
            self._hindrance = ""
        except (OffsiteError, OSError) as error:
            fault = from_system(error) if isinstance(error, OSError) else error
            if str(fault) != self._hindrance and not isinstance(fault, UnreachableError):
                self._say(f"the certificate of {self.identity.folder} is not kept up to date: {fault}")
            self._hindrance = str(fault)

    def refresh(self) -> None:
        """Take the newest list of certificates."""
        self._take(self._membership.revocations(list_number(self.identity.folder)))

    def renew(self, *, wait_s: float = ASK_S) -> Identity:
        """Renew the certificate now; return what holds then, the same where nobody has signed for so long."""
        kit = self.identity.folder
        newest = Identity.load(kit, expect=self.identity.role)
        if newest.certificate == self.identity.certificate:  # else another process has renewed it
            key = next_key(kit)
            reply = self._membership.renew(wait_s=wait_s)
            self._take(reply.revocations)
            if not reply.certificate:
                return newest
            own = Identity.of(kit, reply.certificate, private(key), newest.authority, expect=newest.role)
            if own.name != newest.name:
                raise IdentityError(f"{kit}: the certificate that came is of {own.name!r}")
            if Identity.load(kit).certificate == newest.certificate:  # else another process was faster
                replace_pair(kit, reply.certificate)
            newest = Identity.load(kit, expect=newest.role)
            self._say(f"renewed the certificate of {newest.name}, which holds until {newest.expires:%Y-%m-%d}")
        self.identity = newest
        self._channel.show(newest)
        return newest

    def _take(self, revocations: bytes) -> None:
        if revocations:
            replace_list(self.identity.folder, revocations)
