"""A gRPC channel over mutual TLS: errors in our words, retries with jitter, downloads and uploads that resume."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc

from offsite.client.apart import many, one
from offsite.client.transfers import Incoming, Outgoing
from offsite.protos.addresses import Address, parse_all
from offsite.protos.chunks import STALL_S, digest_file, is_digest
from offsite.protos.documents import plain
from offsite.protos.errors import (
    IdentityError,
    InputError,
    MismatchError,
    OffsiteError,
    ResourceError,
    UnreachableError,
    from_status,
)
from offsite.protos.fleet_pb2 import UploadHeader
from offsite.protos.frames import lean
from offsite.protos.security.handshake import check_coordinator, coordinator_certificate
from offsite.protos.security.identity import Identity
from offsite.protos.security.tls import channel_credentials, explain

T = TypeVar("T")

FIRST_PAUSE_S = 0.2  # before a call is made again; the next ones are longer
OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # a long run's report
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class Lines:
    """What stubs speak through: a gRPC channel to them, but each call takes the connection that holds just then.

    No call is made in the thread that asks for it, which may be the one that an interrupt is raised in.
    """

    def __init__(self, line: Callable[..., Any]) -> None:
        self._line = line

    def __getattr__(self, kind: str) -> Any:
        def method(*path: Any, **codec: Any) -> Any:
            def single(request: Any, **options: Any) -> Any:
                return one(lambda: self._line(kind, *path, **lean(codec))(request, **options))

            def stream(request: Any, *, stall_s: float | None = None) -> Iterator[Any]:
                return many(lambda: self._line(kind, *path, **lean(codec))(request), stall_s=stall_s)

            return stream if kind.endswith("_stream") else single

        return method


class Channel:
    """One coordinator, dialled at the first call and again when it shows another certificate.

    Where `target` names several of its gateways, HOST:PORT,HOST:PORT, they are tried in turn, and one that answers is
    stayed with until it is away. Only a certificate that the kit's list does not refuse is spoken to; the list is read
    again at every call. `patience_s` is how long a call goes on trying while the coordinator does not answer. Every
    call of the protocol may be repeated, so retrying is always safe.
    """

    def __init__(self, target: str, identity: Identity, *, patience_s: float = 10.0) -> None:
        self._gateways = deque(parse_all(target))  # the first is spoken to
        self.patience_s = patience_s
        self.grpc = Lines(self._line)
        self.waiting: Callable[[str], None] = lambda message: None  # is told what a call waits for, once a wait
        self._identity = identity
        self._certificate = b""  # the one that is spoken to; empty: dial anew
        # By where they go and both certificates; others than the last may be in other threads' hands.
        self._connections: dict[tuple[Address, bytes, bytes], grpc.Channel] = {}
        self._dialling = threading.Lock()
        self._closed, self._closing = False, threading.Lock()
        self._met = False  # whether the coordinator has ever answered on this channel

    @property
    def address(self) -> Address:
        """Where the coordinator, or the gateway to it that is spoken to, listens."""
        return self._gateways[0]

    @property
    def target(self) -> str:
        """The same, as it is written."""
        return str(self.address)

    def _connection(self) -> grpc.Channel:
        """Return a connection to a coordinator that may be spoken to; raises IdentityError, UnreachableError."""
        with self._dialling:
            if not self._certificate:
                self._certificate = self._look()
            try:
                check_coordinator(self._certificate, self._identity)
            except IdentityError:
                self._leave()
                raise
            at = (self.address, self._certificate, self._identity.certificate)
            if at not in self._connections:
                credentials = channel_credentials(self._identity, pinned=self._certificate)
                self._connections[at] = grpc.secure_channel(self.target, credentials, options=self._options())
            return self._connections[at]

    def show(self, identity: Identity) -> None:
        """Show another certificate of the same party from the next call on; calls in progress end as they began."""
        with self._dialling:
            self._identity = identity

    def _line(self, kind: str, *path: Any, **codec: Any) -> Any:
        """Return what makes one call; raises IdentityError, UnreachableError."""
        connection = self._connection()
        with self._closing:  # gRPC crashes where this is asked of a channel that is closed
            if self._closed:
                raise UnreachableError(f"{self.target}: this end has closed the connection")
            return getattr(connection, kind)(*path, **codec)

    def _look(self) -> bytes:
        """Return the certificate of the first gateway that may be spoken to, those after the last one first."""
        if self._connections:
            self._gateways.rotate(-1)
        faults: list[OffsiteError] = []
        for _ in range(len(self._gateways)):
            try:
                certificate = coordinator_certificate(self.address, self._identity)
                check_coordinator(certificate, self._identity)
                return certificate
            except ConnectionError as error:
                faults.append(self._no_connection(plain(str(error))))
            except IdentityError as error:
                faults.append(error)
            self._gateways.rotate(-1)
        kind = next((type(fault) for fault in faults if isinstance(fault, UnreachableError)), type(faults[0]))
        raise kind("; ".join(dict.fromkeys(str(fault) for fault in faults)))

    def _leave(self) -> None:
        """Try the next gateway at the next call, if there is one."""
        if len(self._gateways) > 1:
            self._certificate = b""

    def _options(self) -> tuple[tuple[str, int], ...]:
        """A proxy is for what lies beyond this machine, whatever the environment says."""
        return (*OPTIONS, ("grpc.enable_http_proxy", int(not self.address.loopback)))

    def close(self) -> None:
        """Close the connection; calls in progress end, and there are no new ones."""
        with self._closing:
            self._closed = True
        for connection in self._connections.values():
            one(connection.close)

    def call(self, method: Any, request: Any, *, timeout_s: float = STALL_S, patience_s: float | None = None) -> Any:
        """Make a unary call, retrying while the coordinator is away; raises the error the coordinator raised."""
        return self.patiently(lambda: method(request, timeout=timeout_s), patience_s=patience_s)

    def once(self, method: Any, request: Any, *, timeout_s: float) -> Any:
        """Make a unary call without retrying; raises the error the coordinator raised, or UnreachableError."""
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def patiently(
        self, attempt: Callable[[], T], *, progress: Callable[[], int] = lambda: 0, patience_s: float | None = None
    ) -> T:
        """Run an attempt until it succeeds, fails for good, or patience ends; progress renews patience.

        A coordinator that is away, or has no room just now, is asked again.
        """
        patience = self.patience_s if patience_s is None else patience_s
        deadline, reached, pause = time.monotonic() + patience, progress(), FIRST_PAUSE_S
        while True:
            try:
                result = attempt()
                self._met = True
                return result
            except (grpc.RpcError, UnreachableError) as error:
                fault = self._translate(error) if isinstance(error, grpc.RpcError) else error
                if isinstance(fault, UnreachableError):
                    self._leave()
                if progress() > reached:
                    deadline, reached, pause = time.monotonic() + patience, progress(), FIRST_PAUSE_S
                passing = isinstance(fault, UnreachableError | ResourceError) and not self._closed
                if not passing or time.monotonic() > deadline:
                    raise fault from None
            if pause == FIRST_PAUSE_S:
                self.waiting(f"{fault}; asking again")
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 5.0)

    def _translate(self, error: grpc.RpcError) -> OffsiteError:
        status, details = error.code(), plain(error.details() or "")
        if status == grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in details:
            self._certificate = b""
            return UnreachableError(f"{self.target}: the coordinator shows another certificate, which is to be checked")
        if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
            self._leave()
        if status == grpc.StatusCode.UNAVAILABLE:
            return self._no_connection(details)
        if status == grpc.StatusCode.CANCELLED:  # not by us: a server that ends cancels what it is doing
            return UnreachableError(f"{self.target}: the coordinator is stopping")
        if status == grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(f"{self.target}: the coordinator did not answer in time")
        if status == grpc.StatusCode.UNIMPLEMENTED:
            return InputError(
                f"{self.target}: the coordinator does not know this call; it runs another version of offsite"
            )
        return from_status(status.name, details)

    def _no_connection(self, details: str) -> OffsiteError:
        cause = explain(details, self.target)
        if proxy := self.address.proxy():
            cause = type(cause)(f"{cause} (the variable {proxy} names a proxy; no_proxy can spare this host)")
        # A coordinator that let us in before is away, whatever a handshake that broke meanwhile looks like.
        return UnreachableError(str(cause)) if self._met else cause

    def stream(self, method: Any, request: Any) -> Iterator[Any]:
        """Yield the answers of a streaming call; raises the error the coordinator raised."""
        try:
            yield from method(request)
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def download(
        self,
        method: Any,
        digest: str,
        path: Path,
        *,
        size: int | None = None,
        earlier: Path | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Fetch a blob to a path unless it is there, resuming what is half there; return the bytes received.

        The file appears under its name only when its digest is right. Not a byte more than `size` is written. Pieces
        of an `earlier` file that are the same are not fetched. Raises MismatchError, ResourceError.
        """
        if not is_digest(digest):
            raise MismatchError(f"{digest!r} is not a digest")
        if path.exists() and digest_file(path, like=digest) == digest:
            return 0
        with _disk(path), Incoming(path, digest, size=size, earlier=earlier, progress=progress) as incoming:
            self.patiently(lambda: incoming.take(method), progress=lambda: incoming.at)
            incoming.finish()
            return incoming.received

    def upload(self, fleet: Any, header: UploadHeader, path: Path) -> None:
        """Send an update from where the coordinator has it; returns once it is durable there."""
        outgoing = Outgoing(path, header)
        self.patiently(lambda: outgoing.give(fleet.Upload), progress=lambda: outgoing.kept)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a sentence."""
    try:
        yield
    except OSError as error:
        what = f"{path}: cannot be written: {error.strerror}; what came is kept and resumed"
        raise ResourceError(what, reason="FAULT_DISK") from None
