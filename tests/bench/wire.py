"""How fast and how light the path between the two ends is: an update's size down and up, against a bare gRPC stream.

    python tests/bench/wire.py [--size-mb 1000] [--repeats 3] [--folder FOLDER]

A real coordinator's service and a site's channel, each in a process of its own, with certificates and mutual TLS over
loopback: the site downloads an adapter and uploads an update, which is hashed, on disk, checked and stored when the
receipt comes. The yardstick is as many bytes down and up through a bare Python gRPC stream (an asyncio server, a
client of threads, mutual TLS, pieces of 1 MiB from memory), hashed where they arrive with the same hash and dropped.

What the product does beyond the stream: it hashes the blob that it sends, reads and writes files, sums up how far the
update is from its broadcast, and waits for the disk. (The update was hashed as its trainer wrote it.)
On a virtual machine each page of memory that it uses for the first time, or again after it was given back, costs more
than the network (2 s per GB of a new file here, 0.4 s where the memory was in use before). So as much memory as both
files take is used and freed beforehand, as on a machine that has been at work for a while; --untouched leaves that out.
It need not suffice: a system may hand out other pages than those that were freed last.

Both are measured in turns, and the medians printed as a JSON line: seconds; their ratio, and that of the seconds of CPU
of both ends together, which a busy machine disturbs less; and the most memory that each end had resident beyond what
it had when it waited for its first call (`clear_refs` of Linux's /proc resets the peak). A first update of 1 MB goes
before, with which the coordinator loads its tensor library: `first_s` is the seconds of that, its memory counts.
"""

import argparse
import asyncio
import json
import mmap
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from tasks import open_task

from offsite.protos.chunks import CHUNK_BYTES
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.security.tls import channel_credentials, server_credentials

SITE = "bank"
METHOD = "/bench/"
PIECE = bytes(range(256)) * (CHUNK_BYTES // 256)


# a bare stream


async def raw_server(kit: Path, pipe: Connection, count: int) -> None:
    """Serve `down`, which streams pieces, and `up`, which hashes what it is streamed; stops when the pipe speaks."""

    async def down(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield PIECE

    async def up(stream: AsyncIterator[bytes], context: Any) -> bytes:
        whole = blake3()
        async for piece in stream:
            whole.update(piece)
        return bytes(whole.digest())

    server = grpc.aio.server()
    handlers = {"down": grpc.unary_stream_rpc_method_handler(down), "up": grpc.stream_unary_rpc_method_handler(up)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(Identity.load(kit)))
    await server.start()
    cpu = cpu_s()
    pipe.send(port)
    await asyncio.to_thread(pipe.recv)
    pipe.send(cpu_s() - cpu)
    await server.stop(grace=None)


def raw_client(kit: Path, port: int, count: int) -> tuple[float, float]:
    """Stream pieces down and up; return the seconds of each."""
    with grpc.secure_channel(f"127.0.0.1:{port}", channel_credentials(Identity.load(kit))) as channel:
        grpc.channel_ready_future(channel).result()
        start, whole = time.perf_counter(), blake3()
        for piece in channel.unary_stream(METHOD + "down")(b""):
            whole.update(piece)
        middle = time.perf_counter()
        assert channel.stream_unary(METHOD + "up")(PIECE for _ in range(count)) == whole.digest()
        return middle - start, time.perf_counter() - middle


# the product


def resident(name: str) -> int:
    """Bytes this process has resident (VmRSS), or had at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Let the peak of resident memory start anew; return where it starts, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_mb(idle: int) -> float:
    """Return the most this process had resident beyond what it had idle, in MB."""
    return (resident("VmHWM") - idle) / 1e6


def cpu_s() -> float:
    """Return the seconds of CPU this process has used, in all its threads."""
    return time.process_time()


class Idle:
    """An executor that leaves runs alone."""

    fault = ""

    def start(self) -> None: ...
    def supervise(self, run: str) -> None: ...
    def close(self) -> None: ...


def prepare(folder: Path, *, size: int) -> None:
    """Make kits, a home with two open tasks for the site, a small one and that to measure, and updates for them."""
    from offsite.coordinator.home import Home

    authority = Authority.create(folder / "pki")
    kit = authority.issue("coordinator", "coordinator")
    authority.issue("site", SITE)
    home = Home(folder / "home", kit).prepare()
    for run, nbytes in (("first", 10**6), ("measured", size)):
        open_task(home, folder, run, site=SITE, size=nbytes)


async def coordinator(folder: Path, pipe: Connection) -> None:
    """Serve a prepared home; says its port, and when asked, the peak of its memory."""
    from offsite.coordinator.home import Home
    from offsite.coordinator.policy import OwnerPolicy
    from offsite.coordinator.service.server import Server
    from offsite.protos.addresses import parse

    idle = 0

    def ready(port: int, leads: bool) -> None:
        nonlocal idle
        idle = forget_peak()
        pipe.send(port)

    home = Home(folder / "home", folder / "pki" / "coordinator")
    server = Server(home, lambda home: Idle(), policy=OwnerPolicy())
    work = asyncio.create_task(server.serve(parse("127.0.0.1:0", listening=True), ready=ready))
    await asyncio.to_thread(pipe.recv)
    cpu = cpu_s()
    pipe.send("go")
    await asyncio.to_thread(pipe.recv)
    pipe.send({"cpu_s": cpu_s() - cpu, "mb": peak_mb(idle)})
    work.cancel()


def site(folder: Path, pipe: Connection, port: int) -> None:
    """Do both tasks over a site's channel; says what the measured one took, and the peak of its memory."""
    from offsite.client.channel import Channel
    from offsite.protos import fleet_pb2 as pb
    from offsite.protos import fleet_pb2_grpc
    from offsite.protos.processes.memory import keep_freed

    keep_freed()  # as a site's agent does
    channel = Channel(f"127.0.0.1:{port}", Identity.load(folder / "pki" / SITE))
    fleet: Any = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
    channel.call(fleet.Enrol, pb.EnrolRequest(version="0", examples=1))
    idle = forget_peak()
    first = sum(down_and_up(channel, fleet, folder, "first"))
    pipe.send("measured")
    pipe.recv()
    cpu = cpu_s()
    down, up = down_and_up(channel, fleet, folder, "measured")
    pipe.send({"first_s": first, "down_s": down, "up_s": up, "cpu_s": cpu_s() - cpu, "mb": peak_mb(idle)})
    channel.close()


def down_and_up(channel: Any, fleet: Any, folder: Path, run: str) -> tuple[float, float]:
    """Download what a task starts from and upload its update; return the seconds of each."""
    from offsite.protos import fleet_pb2 as pb
    from offsite.protos.documents import from_json, to_json
    from offsite.protos.spec import TaskSpec, UpdateMetrics

    task = from_json(TaskSpec, (folder / f"{run}.json").read_bytes(), where="task")
    metrics = to_json(UpdateMetrics(examples=1, tokens=1, loss=1.0, engine="none")).decode()
    start, update = time.perf_counter(), folder / run
    channel.download(fleet.Download, task.adapter, folder / "work" / run, size=task.adapter_size)
    middle = time.perf_counter()
    key, size = pb.TaskKey(run=run, round=0, attempt=0), update.stat().st_size
    digest = (folder / f"{run}.digest").read_text()
    channel.upload(fleet, pb.UploadHeader(key=key, digest=digest, size=size, metrics=metrics), update)
    return middle - start, time.perf_counter() - middle


# both, in turns


def run(work: Callable[..., Any], *arguments: Any) -> None:
    """Be the body of a child process."""
    result = work(*arguments)
    if asyncio.iscoroutine(result):
        asyncio.run(result)


def started(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Connection]:
    """Start a child with a pipe among its arguments where Ellipsis stands."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=run, args=(work, *(theirs if one is ... else one for one in arguments)), daemon=True)
    child.start()
    theirs.close()
    return child, ours


def touch(size: int) -> None:
    """Use so many bytes of memory, and free them."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def measured(folder: Path, *, size: int, touched: bool) -> dict[str, float]:
    """Measure a bare stream and the product once, in a folder that is new."""
    prepare(folder, size=size)
    kits, count = folder / "pki", size // CHUNK_BYTES
    child, pipe = started(raw_server, kits / "coordinator", ..., count)
    port, cpu = pipe.recv(), cpu_s()
    raw_down, raw_up = raw_client(kits / SITE, port, count)
    cpu = cpu_s() - cpu
    pipe.send("stop")
    raw_cpu = cpu + pipe.recv()
    child.join()
    child, pipe = started(coordinator, folder, ...)
    other, others = started(site, folder, ..., pipe.recv())
    others.recv()  # the small task is over
    if touched:
        touch(3 * size)
    pipe.send("go")
    others.send(pipe.recv())  # both have looked at their clocks
    there = others.recv()
    other.join()
    pipe.send("stop")
    here = pipe.recv()
    child.join()
    return {
        **{"raw_down_s": raw_down, "raw_up_s": raw_up, "down_s": there["down_s"], "up_s": there["up_s"]},
        "ratio": (there["down_s"] + there["up_s"]) / (raw_down + raw_up),
        "cpu_ratio": (there["cpu_s"] + here["cpu_s"]) / raw_cpu,
        **{"first_s": there["first_s"], "coordinator_mb": here["mb"], "site_mb": there["mb"]},
    }


def repeated(folder: Path | None, *, size: int, repeats: int, touched: bool) -> Iterator[dict[str, float]]:
    """Measure again and again, each time with nothing kept."""
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            yield measured(Path(scratch), size=size, touched=touched)


def main() -> None:
    """Measure, and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's folder for temporary files")
    parser.add_argument("--untouched", action="store_true", help="leave memory as it is; see above")
    asked = parser.parse_args()
    size, repeats = asked.size_mb * 10**6, asked.repeats
    rounds = list(repeated(asked.folder, size=size, repeats=repeats, touched=not asked.untouched))
    print(json.dumps({name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]}))


if __name__ == "__main__":
    main()
