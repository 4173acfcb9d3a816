import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from offsite.protos.addresses import Address
from offsite.protos.errors import IdentityError, OffsiteError, UnreachableError
from offsite.protos.security.handshake import coordinator_certificate
from offsite.protos.security.pki import Authority
from offsite.protos.security.tls import Identity, channel_credentials, explain, peer, server_credentials


class Echo(grpc.GenericRpcHandler):
    """Answers every call with who the caller has proved to be."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            caller = peer(context.auth_context())  # type: ignore[arg-type]  # the stub of the asyncio context has it right
        except IdentityError as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return f"{caller.role} {caller.name} {caller.serial:x}".encode()


@contextmanager
def serving(credentials: grpc.ServerCredentials | None, handler: Echo | None = None) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler or Echo(),))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextmanager
def serving_asyncio(credentials: grpc.ServerCredentials) -> Iterator[int]:
    """The server the coordinator runs: its handshakes are grpc's own, its answers asyncio's."""
    ready: Future[int] = Future()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        server = grpc.aio.server()
        ready.set_result(server.add_secure_port("127.0.0.1:0", credentials))
        await server.start()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        yield ready.result(timeout=30)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def call(target: str, credentials: grpc.ChannelCredentials | None) -> str:
    channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
    with channel:
        answer: bytes = channel.unary_unary("/offsite.Test/Who")(b"", timeout=30)
    return answer.decode()


def failure(port: int, credentials: grpc.ChannelCredentials | None, host: str = "127.0.0.1") -> OffsiteError:
    """Make a call that must end UNAVAILABLE and explain it; the explanation is one line that begins with the target."""
    target = f"{host}:{port}"
    with pytest.raises(grpc.RpcError) as caught:
        call(target, credentials)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    error = explain(caught.value.details() or "", target)
    assert str(error).startswith(f"{target}: ")
    assert "\n" not in str(error)
    assert "does not answer" not in str(error), "this failure is known, and has a sentence of its own"
    return error


def distrust(port: int, identity: Identity, host: str = "127.0.0.1") -> OffsiteError:
    """Dial what no client speaks to: a handshake of its own is explained as gRPC's is."""
    error = failure(port, channel_credentials(identity), host)
    with pytest.raises(ConnectionError) as caught:
        coordinator_certificate(Address(host, port), identity)
    assert repr(explain(str(caught.value), f"{host}:{port}")) == repr(error)
    return error


@dataclass(frozen=True)
class Fleet:
    """An authority with a coordinator and a site, and a stranger with kits of an authority of the same name."""

    authority: Authority
    coordinator: Identity
    site: Identity
    expired_kit: Path
    strange_authority: Authority
    strange_site: Identity


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    ours = Authority.create(tmp_path_factory.mktemp("ours"))
    theirs = Authority.create(tmp_path_factory.mktemp("theirs"))
    return Fleet(
        ours,
        Identity.load(ours.issue("coordinator", "hub")),
        Identity.load(ours.issue("site", "berlin")),
        ours.issue("site", "lapsed", _at=datetime.now(UTC) - timedelta(days=400)),
        theirs,
        Identity.load(theirs.issue("site", "berlin")),
    )


@pytest.fixture(scope="module", params=[serving, serving_asyncio])
def port(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[int]:
    """The coordinator's port; failed handshakes never reach a handler, so both kinds of server must agree on them."""
    with request.param(server_credentials(fleet.coordinator)) as port:
        yield port


def unchecked(identity: Identity, kit: Path) -> Identity:
    """An identity with another kit's certificate, as a client would have that does not check its kit."""
    return replace(identity, certificate=(kit / "tls.crt").read_bytes(), key=(kit / "tls.key").read_bytes())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_caller_is_known_by_its_certificate(fleet: Fleet, host: str) -> None:
    researcher = Identity.load(fleet.authority.issue("researcher", f"ada-{host}"))
    serials = {entry.name: entry.serial for entry in fleet.authority.entries()}
    with serving(server_credentials(fleet.coordinator)) as port:
        for identity in (fleet.site, researcher):
            who = f"{identity.role} {identity.name} {serials[identity.name]}"
            assert call(f"{host}:{port}", channel_credentials(identity)) == who


def test_a_client_of_another_authority_refuses_the_coordinator(fleet: Fleet, port: int) -> None:
    error = distrust(port, fleet.strange_site)
    assert isinstance(error, IdentityError)
    assert "not issued by this kit's ca.crt" in str(error)


def test_the_coordinator_refuses_a_certificate_that_expired_or_is_of_another_authority(fleet: Fleet, port: int) -> None:
    for kit in (fleet.expired_kit, fleet.strange_site.folder):
        error = failure(port, channel_credentials(unchecked(fleet.site, kit)))
        assert isinstance(error, IdentityError)
        assert "instead of accepting this kit's certificate" in str(error)


def test_the_coordinator_refuses_a_client_without_a_certificate(fleet: Fleet, port: int) -> None:
    assert isinstance(failure(port, grpc.ssl_channel_credentials(fleet.site.authority)), IdentityError)
    assert isinstance(failure(port, None), IdentityError)  # not even TLS


def test_a_coordinator_that_trusts_another_authority_refuses_the_client(fleet: Fleet) -> None:
    mixed = replace(fleet.coordinator, authority=fleet.strange_site.authority)
    with serving(server_credentials(mixed)) as port:
        error = failure(port, channel_credentials(fleet.site))
    assert isinstance(error, IdentityError)
    assert "instead of accepting this kit's certificate" in str(error)


@pytest.mark.parametrize(("days", "fragment"), [(-400, "coordinator's certificate has expired"), (9, "not valid yet")])
def test_a_client_refuses_a_coordinator_outside_its_dates(fleet: Fleet, days: int, fragment: str) -> None:
    kit = fleet.authority.issue("coordinator", f"hub.{days}", _at=datetime.now(UTC) + timedelta(days=days))
    with serving(server_credentials(unchecked(fleet.coordinator, kit))) as port:
        error = distrust(port, fleet.site)
    assert isinstance(error, IdentityError)
    assert fragment in str(error)


def test_a_client_refuses_a_coordinator_at_a_host_it_does_not_name(fleet: Fleet) -> None:
    kit = fleet.authority.issue("coordinator", "far-hub", hosts=["tune.acme.org"])
    with serving(server_credentials(Identity.load(kit))) as port:
        error = distrust(port, fleet.site)
    assert isinstance(error, IdentityError)
    assert "does not name this host" in str(error)


def test_a_site_cannot_pose_as_the_coordinator(fleet: Fleet) -> None:
    with serving(server_credentials(fleet.site)) as port:
        error = distrust(port, fleet.site)
    assert isinstance(error, IdentityError)
    assert "not a coordinator" in str(error)


def test_a_client_refuses_a_server_without_tls(fleet: Fleet) -> None:
    with serving(None) as port:
        error = distrust(port, fleet.site)
    assert isinstance(error, IdentityError)
    assert "does not speak TLS" in str(error)


def test_where_nothing_listens_the_coordinator_is_unreachable(fleet: Fleet) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound but not listening: refused, and nobody else can take the port
        error = distrust(reserved.getsockname()[1], fleet.site)
    assert isinstance(error, UnreachableError)
    assert "nothing listens there" in str(error)


def test_a_host_that_does_not_exist_is_unreachable(fleet: Fleet) -> None:
    error = distrust(1, fleet.site, host="no-such-host.invalid")
    assert isinstance(error, UnreachableError)
    assert "host name is not known" in str(error)


def test_a_proxy_with_nothing_behind_it_is_unreachable(fleet: Fleet) -> None:
    def hang_up(listener: socket.socket) -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang_up, args=(listener,), daemon=True)
        thread.start()
        error = distrust(listener.getsockname()[1], fleet.site)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert isinstance(error, UnreachableError)
    assert "closed before" in str(error)


@pytest.mark.parametrize(
    "details",
    [
        "Stream removed (Socket closed)",
        "Socket closed",
        "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:10.0.0.7:1: recvmsg:Connection reset (104)",
        "",
    ],
)
def test_a_coordinator_that_was_killed_is_unreachable(details: str) -> None:
    error = explain(details, "hub:8443")
    assert isinstance(error, UnreachableError)
    assert str(error).startswith("hub:8443: the coordinator does not answer")


def test_a_connection_that_outlives_its_certificate_is_refused(fleet: Fleet) -> None:
    with pytest.raises(IdentityError, match="site 'lapsed' expired on"):
        peer({"x509_pem_cert": [(fleet.expired_kit / "tls.crt").read_bytes()]})


def test_a_caller_without_a_certificate_is_nobody() -> None:
    with pytest.raises(IdentityError, match="showed no certificate"):
        peer({"transport_security_type": [b"insecure"]})
