"""How fast and how light the path between the two ends is: an update's size down and up, against a bare gRPC stream.

    python tests/bench/wire.py [--size-mb 1000] [--repeats 3] [--folder FOLDER]

A real coordinator's service and a site's channel, each in a process of its own, with certificates and mutual TLS over
loopback: the site downloads an adapter and uploads an update, which is hashed, on disk, checked and stored when the
receipt comes. The yardstick is as many bytes down and up through a bare Python gRPC stream (an asyncio server, a
client of threads, mutual TLS, pieces of 1 MiB from memory), hashed where they arrive with the same hash and dropped.
Both are measured in turns. Prints a JSON line: medians of seconds and of their ratio, and the most memory that each end
had resident beyond what it had when it waited for its first call (`clear_refs` of Linux's /proc resets the peak).
"""

import argparse
import asyncio
import json
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

from offsite.protos.chunks import CHUNK_BYTES
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.security.tls import channel_credentials, server_credentials

RUN, SITE = "run", "bank"
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
    pipe.send(port)
    await asyncio.to_thread(pipe.recv)
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


class Idle:
    """An executor that leaves runs alone."""

    fault = ""

    def start(self) -> None: ...
    def supervise(self, run: str) -> None: ...
    def close(self) -> None: ...


def prepare(folder: Path, *, size: int) -> None:
    """Make kits, a home with one open task for the site, and the update that answers it."""
    import torch

    from offsite.coordinator.bundles.manifests import describe
    from offsite.coordinator.home import Home
    from offsite.coordinator.runs.steps.results import BUILD, Built
    from offsite.coordinator.runs.steps.storage import store_schema
    from offsite.coordinator.runs.versions import Version
    from offsite.coordinator.store.blobs import Stored
    from offsite.coordinator.store.journal import Key
    from offsite.kernels.schema import Field, Rule
    from offsite.protos import tensors
    from offsite.protos.documents import to_json, to_plain
    from offsite.protos.spec import BaseRef, Choice, LocalTraining, Manifest, RunSpec, TaskSpec

    authority = Authority.create(folder / "pki")
    kit = authority.issue("coordinator", "coordinator")
    authority.issue("site", SITE)
    home = Home(folder / "home", kit).prepare()
    journal, blobs = home.journal(), home.blobs()
    generator = torch.Generator().manual_seed(0)
    adapter = {f"{layer}.q.A": torch.randn(size // 160, generator=generator) for layer in range(40)}
    tensors.save(folder / "adapter", adapter)
    digest, nbytes = blobs.take(folder / "adapter")
    base = BaseRef(name="m", digest=digest, layers=1, parameters=1)
    shape: dict[str, Any] = {
        "layers": (0,),
        "trainable": (0,),
        "shared": {},
        "parameters": 1,
        "verbatim": 1,
        "lossy": 0,
    }
    listed = Manifest(base=base, builders=(Choice(name="whole"),), **shape, files=())
    (folder / "manifest").write_bytes(to_json(listed))
    manifest, manifest_size = blobs.take(folder / "manifest")
    schema = {key: Field("F32", tuple(tensor.shape), Rule.MEAN) for key, tensor in adapter.items()}
    built = Built(
        manifest=manifest,
        manifest_size=manifest_size,
        bundle=describe(listed),
        base=base,
        version=Version(adapter=digest, broadcast={"": Stored(digest=digest, size=nbytes)}),
        tiers={SITE: ""},
        schema=store_schema(blobs, folder, schema),
        method=Choice(name="lora"),
        method_hash=digest,
        learning_rate=1e-3,
        computed="fp32",
        recovery=None,
    )
    task = TaskSpec(
        run=RUN,
        round=0,
        rounds=1,
        site=SITE,
        attempt=0,
        base=digest,
        manifest=manifest,
        manifest_size=manifest_size,
        adapter=digest,
        adapter_size=nbytes,
        method=Choice(name="lora"),
        method_hash=digest,
        training=LocalTraining(steps=1, learning_rate=1e-3),
    )
    journal.add_run(RUN, token=RUN, owner="olga", spec=to_json(RunSpec(model="m", max_update_norm=1e6)))
    journal.add_step(RUN, BUILD.name, to_plain(built))
    journal.add_task(Key(run=RUN, round=0, site=SITE, attempt=0), spec=to_json(task), signature=b"s")
    journal.close()
    for tensor in adapter.values():
        tensor += 1e-3
    origin = {"broadcast": task.adapter, "method_hash": task.method_hash}
    tensors.save(folder / "update", adapter, metadata={"offsite": json.dumps(origin)})
    (folder / "task").write_bytes(to_json(task))


async def coordinator(folder: Path, pipe: Connection) -> None:
    """Serve a prepared home; says its port, and when asked, the peak of its memory."""
    from offsite.coordinator.home import Home
    from offsite.coordinator.policy import OwnerPolicy
    from offsite.coordinator.service.server import Server
    from offsite.protos.addresses import parse

    idle = 0

    def ready(port: int) -> None:
        nonlocal idle
        idle = forget_peak()
        pipe.send(port)

    home = Home(folder / "home", folder / "pki" / "coordinator")
    server = Server(home, lambda home: Idle(), policy=OwnerPolicy())
    work = asyncio.create_task(server.serve(parse("127.0.0.1:0", listening=True), ready=ready))
    await asyncio.to_thread(pipe.recv)
    pipe.send(resident("VmHWM") - idle)
    work.cancel()


def site(folder: Path, pipe: Connection, port: int) -> None:
    """Download and upload over a site's channel; says the seconds of each, and the peak of its memory."""
    from offsite.client.channel import Channel
    from offsite.protos import fleet_pb2 as pb
    from offsite.protos import fleet_pb2_grpc
    from offsite.protos.chunks import digest_file
    from offsite.protos.documents import from_json, to_json
    from offsite.protos.spec import TaskSpec, UpdateMetrics

    channel = Channel(f"127.0.0.1:{port}", Identity.load(folder / "pki" / SITE))
    fleet: Any = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
    task = from_json(TaskSpec, (folder / "task").read_bytes(), where="task")
    channel.call(fleet.Enrol, pb.EnrolRequest(version="0", examples=1))
    idle, start = forget_peak(), time.perf_counter()
    channel.download(fleet.Download, task.adapter, folder / "work" / "adapter", size=task.adapter_size)
    middle, update = time.perf_counter(), folder / "update"
    header = pb.UploadHeader(
        key=pb.TaskKey(run=RUN, round=0, attempt=0),
        digest=digest_file(update),
        size=update.stat().st_size,
        metrics=to_json(UpdateMetrics(examples=1, tokens=1, loss=1.0, engine="none")).decode(),
    )
    channel.upload(fleet, header, update)
    pipe.send((middle - start, time.perf_counter() - middle, resident("VmHWM") - idle))
    channel.close()


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


def measured(folder: Path, *, size: int) -> dict[str, float]:
    """Measure a bare stream and the product once, in a folder that is new."""
    prepare(folder, size=size)
    kits, count = folder / "pki", size // CHUNK_BYTES
    child, pipe = started(raw_server, kits / "coordinator", ..., count)
    raw_down, raw_up = raw_client(kits / SITE, pipe.recv(), count)
    pipe.send("stop")
    child.join()
    child, pipe = started(coordinator, folder, ...)
    other, others = started(site, folder, ..., pipe.recv())
    down, up, at_site = others.recv()
    other.join()
    pipe.send("stop")
    at_coordinator = pipe.recv()
    child.join()
    return {
        "raw_down_s": raw_down,
        "raw_up_s": raw_up,
        "down_s": down,
        "up_s": up,
        "ratio": (down + up) / (raw_down + raw_up),
        "coordinator_mb": at_coordinator / 1e6,
        "site_mb": at_site / 1e6,
    }


def repeated(folder: Path | None, *, size: int, repeats: int) -> Iterator[dict[str, float]]:
    """Measure again and again, each time with nothing kept."""
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            yield measured(Path(scratch), size=size)


def main() -> None:
    """Measure, and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's folder for temporary files")
    asked = parser.parse_args()
    rounds = list(repeated(asked.folder, size=asked.size_mb * 10**6, repeats=asked.repeats))
    print(json.dumps({name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]}))


if __name__ == "__main__":
    main()
