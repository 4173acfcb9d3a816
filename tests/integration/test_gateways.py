"""Several gateways to the same runs, over real processes: sites and people at any, one dispatches, and any may die."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import pytest

from offsite.client import connect
from offsite.protos.errors import ResourceError

AWAY_S = 25.0  # longer than a gateway is taken to be here without a word
SITES = ("bank", "hospital")


def published(run: Any, folder: Path) -> bytes:
    return (Path(run.result(folder)) / "adapter" / "adapter_model.safetensors").read_bytes()


pytestmark = pytest.mark.slow


def stores(journal: str, blobs: str) -> dict[str, str]:
    """The URLs of stores that gateways share, as their environment."""
    return {"OFFSITE_JOURNAL": journal, "OFFSITE_BLOBS": blobs}


class Handler(BaseRequestHandler):
    """Connects to the next gateway, or to the one after it where that is away."""

    def handle(self) -> None:
        with suppress(OSError), self.server.connection() as beyond:  # type: ignore[attr-defined]
            back = threading.Thread(target=pump, args=(beyond, self.request))
            back.start()
            pump(self.request, beyond)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Balancer(ThreadingTCPServer):
    """One address in front of several gateways, whose connections go to each in turn."""

    daemon_threads = True

    def __init__(self, gateways: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._gateways = itertools.cycle(gateways)

    def connection(self) -> socket.socket:
        for gateway in self._gateways:
            host, _, port = gateway.rpartition(":")
            with suppress(OSError):
                return socket.create_connection((host, int(port)))
        raise AssertionError("there are gateways")


@contextmanager
def balanced(gateways: list[str]) -> Iterator[str]:
    with Balancer(gateways) as balancer:
        threading.Thread(target=balancer.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{balancer.server_address[1]}"
        balancer.shutdown()


def gateways(federation: Any) -> list[str]:
    """Start two gateways with a kit each; return their addresses. The first one dispatches."""
    kit = federation.authority.issue("coordinator", "south")
    north = federation.coordinate(name="north", home="north")
    south = federation.coordinate("--identity", str(kit), name="south", home="south")
    assert [federation.events(name, "ready")[0]["dispatches"] for name in ("north", "south")] == [True, False]
    return [north, south]


@pytest.fixture(scope="module")
def wanted(coordinated: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run of two rounds at one coordinator."""
    coordinated.have(*SITES)
    with coordinated.connect() as session:
        run = session.submit(coordinated.spec(rounds=2, sites=SITES))
        return published(run, tmp_path_factory.mktemp("one"))


def follow_while_the_first_is_killed(federation: Any, address: str, folder: Path) -> bytes:
    """Submit a run, kill the gateway that dispatches in its first round, and return the run's adapter."""
    with connect(address, identity=federation.owner, patience_s=60) as session:
        run = session.submit(federation.spec(rounds=2, sites=SITES))
        watched = run.watch()
        while next(watched).kind != "update":
            continue
        federation.kill("north")
        federation.expect("south", "dispatches")
        assert [event.kind for event in watched].count("update") == 3, "each of four is counted once"
        assert "Traceback" not in federation.log("south").read_text()
        return published(run, folder)


def test_a_run_ends_with_the_bytes_of_one_gateway_though_the_one_that_dispatches_is_killed_in_a_round(
    federations: Any, wanted: bytes, tmp_path: Path
) -> None:
    with federations(tmp_path, **stores(f"sqlite://{tmp_path}/journal.db", f"file://{tmp_path}/blobs")) as federation:
        both = gateways(federation)
        for site, order in zip(SITES, (both, both[::-1]), strict=True):
            federation.address = ",".join(order)
            federation.join(site)
        assert {federation.events(site, "enrolled")[0]["coordinator"] for site in SITES} == set(both)
        assert follow_while_the_first_is_killed(federation, both[1], tmp_path / "two") == wanted


def test_gateways_behind_one_address_over_postgresql_and_s3_give_the_same_bytes(
    federations: Any, wanted: bytes, postgresql: Any, s3: Any, tmp_path: Path
) -> None:
    with federations(tmp_path, **stores(postgresql.empty(), s3.url())) as federation:
        with balanced(gateways(federation)) as federation.address:
            federation.have(*SITES)
            assert follow_while_the_first_is_killed(federation, federation.address, tmp_path / "two") == wanted


def test_while_a_store_is_away_all_wait_and_say_so_and_then_go_on_with_the_same_bytes(
    federations: Any, wanted: bytes, postgresql: Any, s3: Any, tmp_path: Path, offsite: Any, wait: Any
) -> None:
    with federations(tmp_path, **stores(postgresql.empty(), s3.url())) as federation:
        both = gateways(federation)
        federation.address = ",".join(both)
        federation.have(*SITES)
        status = ("coordinator", "status", "--home", str(federation.folder / "south"))
        with connect(both[1], identity=federation.owner, patience_s=60) as session:
            s3.kill()
            try:
                run = session.submit(federation.spec(rounds=2, sites=SITES))
                wait(lambda: "waits until the coordinator can use its stored files" in run.refresh().note, "a note")
                assert f"run {run.id}: running: step " in offsite(*status).stdout
            finally:
                s3.start()
            watched = run.watch()
            while next(watched).kind != "update":
                continue
            postgresql.kill()
            try:
                with connect(both[0], identity=federation.owner, patience_s=1) as other:
                    with pytest.raises(ResourceError, match="cannot use its stored files just now; ask again"):
                        other.runs()
                away = offsite(*status)
                assert away.returncode == 8 and "the server cannot be reached" in away.stderr
                time.sleep(AWAY_S)
            finally:
                postgresql.start()
            assert [event.kind for event in watched].count("update") == 3
            assert published(run, tmp_path / "two") == wanted
            wait(lambda: offsite(*status).stdout.count("dispatches") == 1, "one that dispatches")
            assert offsite(*status).stdout.count("stands by") == 1
