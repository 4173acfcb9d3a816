"""Whom a client speaks to: the coordinator whose certificate it checked, by the list in its kit as it is now."""

import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import grpc
import pytest

from offsite.client.channel import Channel
from offsite.client.session import connect
from offsite.protos.errors import IdentityError, UnreachableError
from offsite.protos.fleet_pb2 import EnrolRequest
from offsite.protos.fleet_pb2_grpc import FleetStub
from offsite.protos.runs_pb2 import SitesRequest
from offsite.protos.security import handshake
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.security.tls import server_credentials


class Polite(grpc.GenericRpcHandler):
    """Answers every call with an empty message."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")


@contextmanager
def serving(identity: Identity, port: int = 0) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Polite(),))
    bound = server.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity))
    server.start()
    try:
        yield bound
    finally:
        server.stop(0).wait()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create(tmp_path / "pki")
    made.issue("coordinator", "hub", hosts=["127.0.0.1", "hub.test"])
    return made


@pytest.fixture
def away(authority: Authority, tmp_path: Path) -> Path:
    """Kits that were handed out: what the authority writes reaches them only when it is copied."""
    for role, name in (("researcher", "alice"), ("site", "bank")):
        shutil.copytree(authority.issue(role, name), tmp_path / "away" / name)  # type: ignore[arg-type]
    return tmp_path / "away"


def copy_list(authority: Authority, away: Path) -> None:
    for name in ("alice", "bank"):
        shutil.copy(authority.folder / "crl.pem", away / name)


def enrol(channel: Channel) -> None:
    fleet: Any = FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
    channel.call(fleet.Enrol, EnrolRequest())


def test_a_coordinator_that_is_renewed_is_spoken_to_and_one_that_is_revoked_is_not(
    authority: Authority, away: Path
) -> None:
    first = Identity.load(authority.folder / "hub")
    with serving(first) as port:
        target = f"127.0.0.1:{port}"
        session, site = connect(target, identity=away / "alice"), Channel(target, Identity.load(away / "bank"))
        session.sites(), enrol(site)
        authority.revoke("hub")
        renewed = Identity.load(authority.issue("coordinator", "hub"))
        session.sites(), enrol(site)  # a list is as old as its kit
    with serving(renewed, port):
        session.sites(), enrol(site)  # it is newer than the kits' list, which does not name it
        copy_list(authority, away)
        session.sites(), enrol(site)
    with serving(first, port):
        for call in (session.sites, lambda: enrol(site), connect(target, identity=away / "alice").sites):
            with pytest.raises(IdentityError, match=r"coordinator 'hub' is revoked, by .*crl\.pem"):
                call()
    session.close(), site.close()


def test_a_list_that_is_replaced_counts_on_a_connection_that_stands(authority: Authority, away: Path) -> None:
    with serving(Identity.load(authority.folder / "hub")) as port:
        site = Channel(f"127.0.0.1:{port}", Identity.load(away / "bank"))
        enrol(site)
        authority.revoke("hub")
        copy_list(authority, away)
        with pytest.raises(IdentityError, match="is revoked"):
            enrol(site)
        (away / "bank" / "crl.pem").write_text("no list")
        with pytest.raises(IdentityError, match=r"crl\.pem: not a revocation list"):
            enrol(site)
        site.close()


def test_of_several_gateways_one_that_answers_is_spoken_to_and_another_when_it_is_away(
    authority: Authority, away: Path
) -> None:
    authority.issue("coordinator", "south", hosts=["127.0.0.1"])
    hub, south = (Identity.load(authority.folder / name) for name in ("hub", "south"))
    copy_list(authority, away)
    with serving(hub) as first, serving(south) as second:
        targets = [f"127.0.0.1:{port}" for port in (first, second)]
    site = Channel(", ".join(targets), Identity.load(away / "bank"), patience_s=0)
    with pytest.raises(UnreachableError, match=f"^{targets[0]}: nothing listens there.*; {targets[1]}: nothing"):
        enrol(site)
    with serving(south, second):
        enrol(site)
        assert site.target == targets[1]
        with serving(hub, first):
            enrol(site)
            assert site.target == targets[1], "it stays with one that answers"
    with serving(hub, first):
        site.patience_s = 10
        enrol(site)
        assert site.target == targets[0]
    with serving(south, second):
        enrol(site)
        authority.revoke("south")
        copy_list(authority, away)
        with pytest.raises(IdentityError, match="'south' is revoked"):
            enrol(site)
        with serving(hub, first):
            enrol(site)
            assert site.target == targets[0], "one that is revoked is not spoken to"
    site.close()


def test_a_call_after_the_end_is_an_error_and_not_a_crash(authority: Authority, away: Path) -> None:
    with serving(Identity.load(authority.folder / "hub")) as port:
        site = Channel(f"127.0.0.1:{port}", Identity.load(away / "bank"))
        enrol(site)
        site.close()
        with pytest.raises(UnreachableError, match="this end has closed the connection"):
            enrol(site)


def test_a_listener_that_never_answers_is_unreachable(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UnreachableError, match=f"^{target}: nothing answers there in time"):
            connect(target, identity=away / "alice", patience_s=0).sites()


class Proxy(StreamRequestHandler):
    """Connects to the port it is asked for on this machine, whatever the host, and notes what was asked."""

    def handle(self) -> None:
        asked, *headers = iter(lambda: self.rfile.readline().decode().strip(), "")
        self.server.asked.append((asked.split()[1], "Proxy-Authorization: Basic YTpi" in headers))  # type: ignore[attr-defined]
        with socket.create_connection(("127.0.0.1", int(asked.split()[1].rpartition(":")[2]))) as beyond:
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(beyond, self.request))
            back.start()
            pump(self.request, beyond)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def test_the_first_look_goes_through_the_proxy_that_grpc_takes(
    authority: Authority, away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Identity.load(authority.folder / "hub")) as port, ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.asked, target = [], f"hub.test:{port}"  # type: ignore[attr-defined]
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("grpc_proxy", f"http://a:b@127.0.0.1:{proxy.server_address[1]}")
        with connect(target, identity=away / "alice") as session:
            session.call("Sites", SitesRequest())
        proxy.shutdown()
        assert proxy.asked == [(target, True)] * 2  # type: ignore[attr-defined]
