"""What thousands of sites that wait cost a coordinator on one core, and how soon all of them have their tasks.

    python tests/bench/gateway.py [--sites 2000] [--seconds 20]

Every site has a certificate of its own and calls over mutual TLS on loopback. The coordinator is pinned to one core;
the sites, the supervisor that opens the rounds and whoever asks for lists share another. It prints one JSON line:
the coordinator's share of its core while nothing happens, how long `run list` takes then, how long a site waits for a
task that was written for it alone, and how long after a round was opened the last site had its task. The machine's
load is printed beside them: where others work on the same cores, the waits are theirs too, and `chrt -r 1` in front of
the command keeps them apart.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from offsite.client import connect
from offsite.coordinator.bundles.manifests import describe
from offsite.coordinator.home import Home
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs.steps.results import Built
from offsite.coordinator.runs.supervisor import Supervisor
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.service.server import run
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import Key
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc
from offsite.protos.addresses import Address
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json
from offsite.protos.events import Cancelled, Completed
from offsite.protos.security.certificates import Issuer, new_certificate
from offsite.protos.security.pki import Authority
from offsite.protos.security.revocation import new_revocation_list
from offsite.protos.spec import BaseRef, Choice, Manifest, RunSpec

WAIT_S = 20.0  # one long poll of a site
ENDED = 500  # runs that are over, all of them on the list
DIALS = 32  # handshakes at once
SETTLE_S = 5.0  # after all have called at once
DIGEST = digest_bytes(b"anything")


def issue(folder: Path, sites: list[str]) -> dict[str, tuple[bytes, bytes, bytes]]:
    """Make the kits of a coordinator and an owner; return (authority, key, certificate) of each site, as PEM."""
    authority = Authority.create(folder / "pki")
    people = [authority.issue("coordinator", "hub"), authority.issue("owner", "olga")]
    ca = (folder / "pki" / "ca.crt").read_bytes()
    key = load_pem_private_key((folder / "pki" / "ca.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    issuer, now, kits = Issuer(x509.load_pem_x509_certificate(ca), key), datetime.now(UTC), {}
    issued = [int(entry.serial, 16) for entry in authority.entries()]
    until = now + timedelta(days=90)
    for site in sites:
        own = ec.generate_private_key(ec.SECP256R1())
        made = new_certificate(issuer, own.public_key(), "site", site, hosts=(), start=now, end=until)
        issued.append(made.serial_number)
        pem = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        kits[site] = ca, pem, made.public_bytes(Encoding.PEM)
    number = int(now.timestamp()) + 100
    listed = new_revocation_list(issuer, number=number, issued=issued, revoked=(), now=now, until=until)
    for kit in people:
        (kit / "crl.pem").write_bytes(listed.public_bytes(Encoding.PEM))
    return kits


class Nobody:
    """An executor for runs whose supervisor this script is."""

    fault = ""

    def start(self) -> None:
        """Nothing to start."""

    def supervise(self, run: str) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to end."""


def coordinate(home: Home, core: int, words: Connection) -> None:
    """Be the coordinator, on one core."""
    os.sched_setaffinity(0, {core})
    run(
        home,
        Address("127.0.0.1", 0),
        lambda _: Nobody(),
        policy=OwnerPolicy(),
        ready=lambda port, leads: words.send(port),
    )


@dataclass
class Sites:
    """All sites in one event loop: each enrols, pulls, and says when a task came; it then waits to be sent on."""

    address: str
    words: Connection
    dialling: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DIALS))
    onward: asyncio.Event = field(default_factory=asyncio.Event)

    async def attend(self, kits: dict[str, tuple[bytes, bytes, bytes]]) -> None:
        """Let every site wait for tasks, for as long as this process lives."""
        asyncio.get_running_loop().add_reader(self.words.fileno(), self._hear)
        await asyncio.gather(*(self._site(*kit) for kit in kits.values()))

    def _hear(self) -> None:
        self.words.recv()
        self.onward.set()
        self.onward = asyncio.Event()

    async def _site(self, ca: bytes, key: bytes, certificate: bytes) -> None:
        channel = grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(ca, key, certificate))
        fleet: Any = fleet_pb2_grpc.FleetStub(channel)  # type: ignore[no-untyped-call]
        async with self.dialling:
            await fleet.Enrol(pb.EnrolRequest(version="0", examples=1), wait_for_ready=True)
        self.words.send("waits")
        while True:
            try:
                reply = await fleet.PullTask(pb.PullTaskRequest(wait_s=WAIT_S), timeout=WAIT_S + 30)
            except grpc.aio.AioRpcError as error:  # a site asks again, too
                print(f"a site asks again: {error.code().name}: {error.details()}", file=sys.stderr)
                await asyncio.sleep(1)
                continue
            if reply.task:
                onward = self.onward
                self.words.send(time.time())
                await onward.wait()


def attend(address: str, core: int, kits: dict[str, tuple[bytes, bytes, bytes]], words: Connection) -> None:
    """Be all sites, on the other core."""
    os.sched_setaffinity(0, {core})

    async def main() -> None:
        await Sites(address, words).attend(kits)

    asyncio.run(main())


def supervise(home: Home, run: str, sites: list[str], begin: Callable[[], None]) -> None:
    """Open the first round of a run as its supervisor does; `begin` is called when the first task may be written."""
    base = BaseRef(name="m", digest=DIGEST, layers=1, parameters=1)
    manifest = Manifest(
        base=base,
        builders=(Choice(name="whole"),),
        layers=(0,),
        trainable=(0,),
        parameters=1,
        verbatim=1,
        lossy=0,
        files=(),
    )
    built = Built(
        manifest=DIGEST,
        manifest_size=1,
        bundle=describe(manifest),
        base=base,
        method_hash=DIGEST,
        version=Version(adapter=DIGEST, broadcast={"r8": Stored(digest=DIGEST, size=1)}),
        tiers=dict.fromkeys(sites, "r8"),
        schema=DIGEST,
        update_sizes={"r8": 1},
        method=Choice(name="lora"),
        learning_rate=0.01,
        computed="fp32",
        recovery=None,
    )

    def perform(*_: Any) -> bytes:
        begin()
        return to_json(built)

    Supervisor(home, run, perform=perform).run()


class Gateway:
    """A coordinator with its sites."""

    def __init__(self, folder: Path, sites: int) -> None:
        self.names = [f"site-{number:05d}" for number in range(sites)]
        kits = issue(folder, self.names)
        self.home = Home(folder / "home", folder / "pki" / "hub").prepare()
        self.journal = self.home.journal()
        spec = to_json(RunSpec(model="m", name="bench"))
        for number in range(ENDED):
            self.journal.add_run(f"old-{number}", token=f"old-{number}", owner="olga", spec=spec)
            self.journal.end_run(f"old-{number}", Completed())
        here, other = sorted(os.sched_getaffinity(0))[:2]
        os.sched_setaffinity(0, {other})
        spawn = multiprocessing.get_context("spawn")
        ready, there = spawn.Pipe()
        self.process = spawn.Process(target=coordinate, args=(self.home, here, there), daemon=True)
        self.process.start()
        self.address = f"127.0.0.1:{ready.recv()}"
        self.words, there = spawn.Pipe()
        self.sites = spawn.Process(target=attend, args=(self.address, other, kits, there), daemon=True)
        self.sites.start()
        self.hear(sites)
        self._kept = there

    def hear(self, count: int) -> list[Any]:
        """Return the next words of sites; raises TimeoutError when they do not come."""
        heard: list[Any] = []
        for _ in range(count):
            if not self.words.poll(120):
                raise TimeoutError(f"{len(heard)} of {count} sites were heard")
            heard.append(self.words.recv())
        return heard

    def idle(self, seconds: float) -> float:
        """Return the coordinator's share of its core while nothing happens."""
        process = psutil.Process(self.process.pid)
        before, started = process.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / (time.monotonic() - started)

    def lists(self, seconds: float) -> list[float]:
        """Return how long each of many lists of runs took, in seconds."""
        took, until = [], time.monotonic() + seconds
        with connect(self.address, identity=self.home.identity.parent / "olga") as session:
            while time.monotonic() < until:
                started = time.monotonic()
                assert len(session.runs(limit=ENDED)) == ENDED
                took.append(time.monotonic() - started)
                time.sleep(0.05)
        return took

    def offer(self, number: int) -> float:
        """Return how long after a task was written for one site alone it had it, in seconds."""
        run, site = f"single-{number}", self.names[number % len(self.names)]
        self._begin(run, [site])
        spec = json.dumps({"run": run}).encode()
        self.journal.add_task(Key(run=run, round=0, site=site, attempt=0), spec=spec, signature=b"s")
        written = time.time()
        [came] = self.hear(1)
        self._end(run)
        return float(came) - written

    def round(self, number: int) -> float:
        """Return how long after a round was opened the last site had its task, in seconds."""
        time.sleep(SETTLE_S)  # until all wait again
        run, opened = f"round-{number}", [0.0]
        self._begin(run, self.names)

        def begin() -> None:
            opened[0] = time.time()

        supervisor = threading.Thread(target=supervise, args=(self.home, run, self.names, begin))
        supervisor.start()
        came = self.hear(len(self.names))
        self._end(run)
        supervisor.join()
        return float(max(came)) - opened[0]

    def _begin(self, run: str, sites: list[str]) -> None:
        spec = RunSpec(model="m", min_sites=len(sites))
        self.journal.add_run(run, token=run, owner="olga", spec=to_json(spec))
        self.journal.begin_run(run, sites)

    def _end(self, run: str) -> None:
        self.journal.end_run(run, Cancelled(error="measured"))
        self.words.send("onward")

    def close(self) -> None:
        """End the processes."""
        self.sites.kill()  # so that no site says that its call is over
        self.process.terminate()
        for process in (self.sites, self.process):
            process.join()
        self.journal.close()


def main() -> None:
    """Measure and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=2000)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of each measurement; a site polls again every 20 s"
    )
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"  # as `offsite coordinator up` sets it
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder), asked.sites)
        try:
            time.sleep(SETTLE_S)
            idle, lists = gateway.idle(asked.seconds), sorted(gateway.lists(asked.seconds))
            offers = sorted(gateway.offer(number) for number in range(20))
            rounds = [gateway.round(number) for number in range(asked.rounds)]
        finally:
            gateway.close()
    figures = {
        "load": os.getloadavg()[0],
        "idle_share_of_a_core": idle,
        "list_p50_s": statistics.median(lists),
        "list_p99_s": lists[int(0.99 * len(lists))],
        "task_p50_s": statistics.median(offers),
        "task_most_s": offers[-1],
        "round_reaches_all_s": statistics.median(rounds),
        "round_most_s": max(rounds),
    }
    print(json.dumps({"sites": asked.sites} | {name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
