"""A gateway, the coordinator's process: a gRPC server with mutual TLS in front of the stores.

Several share nothing but these; one of them at a time starts the supervisors, too (`leadership.py`).
"""

import asyncio
import contextlib
import fcntl
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from offsite.coordinator.home import Home
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.retention import Retention
from offsite.coordinator.runs.dispatch import PLACES
from offsite.coordinator.runs.executor import Executor
from offsite.coordinator.runs.leadership import Leadership
from offsite.coordinator.service.admission import Admission
from offsite.coordinator.service.certificate import OwnCertificate
from offsite.coordinator.service.fleet import FleetService
from offsite.coordinator.service.gateway import Gateway
from offsite.coordinator.service.limits import CALLS
from offsite.coordinator.service.meter import Gauged, Meter
from offsite.coordinator.service.people import RunsService
from offsite.coordinator.store.changes import Changes
from offsite.protos.addresses import Address
from offsite.protos.errors import OffsiteError, ResourceError
from offsite.protos.fleet_pb2_grpc import add_FleetServicer_to_server
from offsite.protos.frames import lean
from offsite.protos.processes.memory import keep_freed
from offsite.protos.runs_pb2_grpc import add_RunsServicer_to_server
from offsite.protos.security.tls import server_credentials

log = logging.getLogger(__name__)

CONNECTIONS = 4096  # of sites and people; each takes a file of this process

OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second coordinator would take half of the calls without a word
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_receive_message_length", 6 << 20),  # a chunk, a spec or an update's metrics
    ("grpc.max_metadata_size", 4096),
    ("grpc.max_concurrent_streams", 2 * CALLS),  # of one connection; `Limits` bounds those of one certificate
    ("grpc.max_allowed_incoming_connections", CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_age_ms", 3_600_000),  # what stalls on a connection ends with it; what goes on resumes
    ("grpc.max_connection_age_grace_ms", 300_000),
    ("grpc.http2.bdp_probe", 0),  # else the window of a fast stream grows, and with it what lies in memory
)


class _Lean(grpc.aio.ServerInterceptor):
    """Has transfers read and written without protobuf's copies."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such call
            return None
        names = ("request_deserializer", "response_serializer")
        return handler._replace(**lean({name: getattr(handler, name) for name in names}))


class Server:
    """One gateway over a home folder of its own."""

    def __init__(
        self,
        home: Home,
        make_executor: Callable[[Home], Executor] | None,
        *,
        policy: OwnerPolicy,
        places: int = PLACES,
        retention: Retention = Retention(),  # noqa: B008 (frozen)
        journal: str = "",
        blobs: str = "",
        authority: Path | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._authority, self._meter = authority, meter or Meter()
        self._home = home.prepare()
        self._certificate = OwnCertificate(home.identity, authority=authority)
        self._lead: Callable[..., Leadership] | None = None
        if make_executor is not None:
            self._lead = partial(Leadership, make_executor=make_executor, places=places, retention=retention)
        self._lock = self._alone()
        self._policy = policy
        home.use(journal=journal, blobs=blobs)
        home.keep(policy)
        home.sweep()

    def _alone(self) -> object:
        """Hold the home for this process; the lock ends with it, however it ends."""
        handle = (self._home.root / "lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"{self._home.root}: another coordinator is using this folder; stop it or name another"
            ) from None
        return handle

    async def serve(
        self,
        address: Address,
        *,
        ready: Callable[[int, bool], None],
        moved: Callable[[bool], None] = lambda leads: None,
    ) -> None:
        """Serve until SIGINT or SIGTERM.

        `ready` is told the port once sites may call, and whether this gateway dispatches; `moved` when that changes.
        """
        keep_freed()
        journal, blobs = self._home.journal(), self._home.blobs()
        journal.check()
        admission = Admission(self._home, journal, authority=self._authority, meter=self._meter)
        _probe(address)
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        gateway, changes = Gateway(self._home, journal, blobs, policy=self._policy), Changes(journal)
        leadership = self._lead(self._home, journal, changes, name=gateway.name) if self._lead else None
        await asyncio.to_thread(gateway.join, str(address))
        try:
            if leadership and not await _begin(leadership, stop):
                return
            _allow_files(2 * CONNECTIONS)
            server = grpc.aio.server(options=OPTIONS, interceptors=[_Lean()])
            port = self._bind(server, address)
            admission.serve(server, changes)
            fleet = FleetService(self._home, journal, blobs, admission.gate, changes)
            add_FleetServicer_to_server(fleet, server)  # type: ignore[no-untyped-call]
            runs = RunsService(journal, blobs, admission.gate, changes, policy=self._policy)
            add_RunsServicer_to_server(runs, server)  # type: ignore[no-untyped-call]
            await server.start()

            def leads() -> bool:
                return leadership is not None and leadership.leads

            try:
                await asyncio.to_thread(gateway.join, str(Address(address.host, port)))
                self._meter.begin(Gauged(self._home, journal, blobs, lambda: len(fleet.waiting), leads))
                ready(port, leads())
                jobs = [changes.follow(), fleet.waiting.work(), gateway.work(), self._meter.work()]
                jobs += [*admission.jobs(changes), self._certificate.work()]
                jobs += [leadership.work(moved)] if leadership else []
                work = [asyncio.create_task(job) for job in jobs]
                await asyncio.wait({*work, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
                for task in work:
                    if task.done():
                        task.result()  # raises: the journal is damaged, or other gateways are unlike this one
            finally:
                self._meter.end()
                fleet.waiting.close()
                await server.stop(grace=1.0)
        finally:
            if leadership:
                leadership.close()
            gateway.leave()
            journal.close()

    def _credentials(self) -> grpc.ServerCredentials:
        return server_credentials(self._certificate.identity, self._certificate.newest)

    def _bind(self, server: grpc.aio.Server, address: Address) -> int:
        try:
            return server.add_secure_port(str(address), self._credentials())
        except RuntimeError as error:
            raise ResourceError(f"cannot listen on {address}: {error}") from None


async def _begin(leadership: Leadership, stop: asyncio.Event) -> bool:
    """Dispatch if no other gateway does; False when told to stop while an executor starts, which can take long."""
    begin = asyncio.create_task(leadership.begin())
    await asyncio.wait({begin, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        leadership.close()
        with contextlib.suppress(OffsiteError):
            await begin
        return False
    await begin
    return True


def _collect_seldom() -> None:
    """Have Python look through all objects for cycles a tenth as often: with 2,000 sites all calls wait 0.14 s for it.

    What has been imported is not looked at again.
    """
    gc.collect()
    gc.freeze()
    first, second, _ = gc.get_threshold()
    gc.set_threshold(first, second, 100)


def _allow_files(count: int) -> None:
    """Raise the bound on this process's open files, as far as it may be: often it is a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _probe(address: Address) -> None:
    """Raise at once, before an executor is started, if the address cannot be listened on."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address.host, address.port))
    except OSError as error:
        raise ResourceError(f"cannot listen on {address}: {error.strerror}; name another with --listen") from None


def run(
    home: Home,
    address: Address,
    make_executor: Callable[[Home], Executor] | None,
    *,
    policy: OwnerPolicy,
    ready: Callable[[int, bool], None],
    moved: Callable[[bool], None] = lambda leads: None,
    places: int = PLACES,
    retention: Retention = Retention(),  # noqa: B008 (frozen)
    **more: Any,
) -> None:
    """Serve in this thread until a signal; raises ResourceError when the port or the folder is taken.

    The journal and the blobs are URLs; empty: those that the home uses already. Without an executor it serves only,
    and another gateway dispatches. `authority` is the folder of the one that answers whoever joins or renews; without
    it they wait for one elsewhere.
    """
    server = Server(home, make_executor, policy=policy, places=places, retention=retention, **more)
    _collect_seldom()
    asyncio.run(server.serve(address, ready=ready, moved=moved))
