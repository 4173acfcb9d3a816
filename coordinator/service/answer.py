"""The one place where errors become gRPC answers, and certificates become names."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from offsite.coordinator.service.limits import Limits, check_request
from offsite.coordinator.service.meter import Meter
from offsite.coordinator.store import Unusable
from offsite.coordinator.store.database import Unwritable
from offsite.protos.documents import plain
from offsite.protos.errors import OffsiteError, RefusedError, from_system
from offsite.protos.security.certificates import Peer, Role, either
from offsite.protos.security.revocation import Revocations, Unlisted
from offsite.protos.security.tls import peer
from offsite.protos.telemetry.logs import about

RECHECK_S = 1.0  # between looks at whether a caller whose transfer goes on still holds

log = logging.getLogger(__name__)


class Gate:
    """Lets callers in by the role in their certificate."""

    def __init__(
        self,
        revocations: Revocations,
        *,
        look: Callable[[], Awaitable[None]] | None = None,
        meter: Meter | None = None,
    ) -> None:
        """Take the list of the certificates that hold, what looks whether there is a newer one, and what counts."""
        self._revocations, self._look = revocations, look
        self.meter = meter or Meter()
        self._limits = Limits()
        self._hindrance = ""  # why a store could not be used, as it was logged last

    def _say(self, hindrance: str) -> None:
        if hindrance != self._hindrance:
            log.error("%s", hindrance)
        self._hindrance = hindrance

    def recheck(self, caller: Peer) -> None:
        """Check a caller again in the course of a long call: it may have been revoked, or have expired, meanwhile."""
        self._revocations.check(caller)

    def rechecks(self, caller: Peer) -> Callable[[bool], None]:
        """Return the same for a transfer, which asks at each piece: it is done each RECHECK_S, and at the last one."""
        due = time.monotonic() + RECHECK_S

        def recheck(last: bool) -> None:
            nonlocal due
            if (now := time.monotonic()) >= due or last:
                due = now + RECHECK_S
                self.recheck(caller)

        return recheck

    async def _check(self, caller: Peer) -> None:
        """Check a caller, who may have joined just now, at another gateway."""
        try:
            self._revocations.check(caller)
        except Unlisted:
            if self._look is None:
                raise
            await self._look()
            self._revocations.check(caller)

    @asynccontextmanager
    async def __call__(
        self, context: Any, *roles: Role, request: Message | None = None, transfer: bool = False
    ) -> AsyncIterator[Peer]:
        """Check the caller and the request, and answer errors of the body with their status and sentence.

        A call, and a transfer of bytes among them, counts until its answer is on its way, which a reader that stalls
        can delay.
        """
        with ExitStack() as counted:
            try:
                caller = peer(context.auth_context())
                await self._check(caller)
                if caller.role not in roles:
                    raise RefusedError(
                        f"{caller.name} has a certificate for role {caller.role}; this call needs role {either(roles)}"
                    )
                counted.enter_context(about(**({"site": caller.name} if caller.role == "site" else {})))
                counted.enter_context(self._limits.call(caller.serial))
                if transfer:
                    counted.enter_context(self._limits.transfer(caller.serial))
                if request is not None:
                    check_request(request)
                yield caller
            except Unusable as error:  # where the owner's files lie is for the log
                if not isinstance(error, Unwritable):  # of which the gateway speaks, once
                    self._say(str(error))
                message = "the coordinator cannot use its stored files just now; ask again"
                await context.abort(grpc.StatusCode[error.status], message)
            except OffsiteError as error:
                await context.abort(grpc.StatusCode[error.status], plain(str(error)))
            except (grpc.aio.AbortError, grpc.aio.InternalError):  # the second: the caller is gone
                raise
            except OSError as error:
                log.exception("while answering")
                error.filename = None  # where the owner's files lie is for the log
                known = from_system(error)
                await context.abort(grpc.StatusCode[known.status], f"at the coordinator: {known}")
            except Exception as error:
                log.exception("while answering")
                message = f"internal error at the coordinator: {type(error).__name__}; its log says more"
                await context.abort(grpc.StatusCode.INTERNAL, message)
