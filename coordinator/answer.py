"""The one place where errors become gRPC answers, and certificates become names."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from offsite.protos.documents import plain
from offsite.protos.errors import OffsiteError, RefusedError, from_system
from offsite.protos.security.certificates import Role, either
from offsite.protos.security.tls import Peer, Revocations, peer

log = logging.getLogger(__name__)


class Gate:
    """Lets callers in by the role in their certificate."""

    def __init__(self, revocations: Revocations) -> None:
        self._revocations = revocations

    @asynccontextmanager
    async def __call__(self, context: Any, *roles: Role) -> AsyncIterator[Peer]:
        """Check that the caller has one of the roles, and answer errors of the body with their status and sentence."""
        try:
            caller = peer(context.auth_context())
            self._revocations.check(caller)
            if caller.role not in roles:
                raise RefusedError(
                    f"{caller.name} has a certificate for role {caller.role}; this call needs role {either(roles)}"
                )
            yield caller
        except OffsiteError as error:
            await context.abort(grpc.StatusCode[error.status], plain(str(error)))
        except grpc.aio.AbortError:
            raise
        except OSError as error:
            log.exception("while answering")
            known = from_system(error)
            await context.abort(grpc.StatusCode[known.status], f"at the coordinator: {known}")
        except Exception as error:
            log.exception("while answering")
            await context.abort(
                grpc.StatusCode.INTERNAL, f"internal error at the coordinator: {type(error).__name__}: {error}"
            )
