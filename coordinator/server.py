"""The coordinator process: a gRPC server with mutual TLS in front of the journal and the supervisors."""

import asyncio
import contextlib
import fcntl
import logging
import signal
import socket
from collections.abc import Callable

import grpc

from offsite.coordinator.answer import Gate
from offsite.coordinator.executor import Executor
from offsite.coordinator.fleet import FleetService
from offsite.coordinator.home import Home
from offsite.coordinator.people import RunsService
from offsite.coordinator.store.journal import LIVE
from offsite.protos.addresses import Address
from offsite.protos.errors import ResourceError
from offsite.protos.fleet_pb2_grpc import add_FleetServicer_to_server
from offsite.protos.runs_pb2_grpc import add_RunsServicer_to_server
from offsite.protos.security.identity import Identity
from offsite.protos.security.tls import Revocations, server_credentials

log = logging.getLogger(__name__)

SUPERVISE_EVERY_S = 30.0

OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second coordinator would take half of the calls without a word
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class Server:
    """One coordinator over one home folder."""

    def __init__(self, home: Home, make_executor: Callable[[Home], Executor]) -> None:
        self._home = home.prepare()
        self._identity = Identity.load(home.identity, expect="coordinator")
        if self._identity.warning:
            log.warning(self._identity.warning)
        self._make_executor = make_executor
        self._lock = self._alone()
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

    async def serve(self, address: Address, *, ready: Callable[[int], None]) -> None:
        """Serve until SIGINT or SIGTERM; `ready` is told the port once sites may call and supervisors can start."""
        journal, blobs = self._home.journal(), self._home.blobs()
        gate = Gate(Revocations(self._home.identity / "crl.pem"))
        _probe(address)
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        # Before there is a gRPC server: an executor may fork, and a fork amid gRPC's threads can crash the child.
        executor = await asyncio.to_thread(self._make_executor, self._home)
        server = grpc.aio.server(options=OPTIONS)
        port = self._bind(server, address)
        add_FleetServicer_to_server(FleetService(self._home, journal, blobs, gate), server)  # type: ignore[no-untyped-call]
        add_RunsServicer_to_server(RunsService(journal, blobs, gate, executor.supervise), server)  # type: ignore[no-untyped-call]
        await server.start()
        try:
            told = False
            while not stop.is_set():  # again and again: a supervisor that was lost is replaced
                for run in journal.runs(LIVE):
                    await asyncio.to_thread(executor.supervise, run.id)
                if not told:
                    ready(port)
                    told = True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), timeout=SUPERVISE_EVERY_S)
        finally:
            await server.stop(grace=1.0)
            executor.close()
            journal.close()

    def _bind(self, server: grpc.aio.Server, address: Address) -> int:
        try:
            return server.add_secure_port(str(address), server_credentials(self._identity))
        except RuntimeError as error:
            raise ResourceError(f"cannot listen on {address}: {error}") from None


def _probe(address: Address) -> None:
    """Raise at once, before an executor is started, if the address cannot be listened on."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address.host, address.port))
    except OSError as error:
        raise ResourceError(f"cannot listen on {address}: {error.strerror}; name another with --listen") from None


def run(
    home: Home, address: Address, make_executor: Callable[[Home], Executor], *, ready: Callable[[int], None]
) -> None:
    """Serve in this thread until a signal; raises ResourceError when the port or the folder is taken."""
    asyncio.run(Server(home, make_executor).serve(address, ready=ready))
