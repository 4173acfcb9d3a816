"""The process that speaks to a Ray cluster for a simulation: it lends it the cores of the other machines.

On each that fits there is an actor with a pool of its own. To the simulation each of its workers is a line on which
orders go and replies come, as to its own ones. In between, this process sends the files that orders name, by digest,
and puts the updates that come back into a spool file here. It ends with its stdin, and the actors with it.
"""

import contextlib
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from io import BufferedRWPair
from itertools import count, repeat
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TextIO

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offsite.coordinator.cluster.view import VERSION_LABEL, label
from offsite.coordinator.node import sweep
from offsite.deploy.simulation.orders import Order, Reply, RoundOrder, Setup
from offsite.deploy.simulation.pool import Pool
from offsite.deploy.simulation.spool import Spool, read, write
from offsite.emulator.zoo import cache_folder
from offsite.protos.chunks import digest_file, hex_of, read_chunks
from offsite.protos.documents import from_json, plain, to_json
from offsite.protos.errors import MismatchError, RunError

BEAT_S = 2.0
END_S = 10.0
PIECE_BYTES = 32 << 20  # of a file, on its way

Files = Mapping[str, Path]  # by digest
Stays = dict[str, bytes]  # what stages left out of updates, by the names of its files

SAID: TextIO = sys.stdout


def main(address: str, job: Path) -> None:
    """Lend what there is and what comes, until nobody wants it any more."""
    setup = from_json(Setup, job.read_bytes(), where=str(job))
    machines: list[_Machine] = []
    threading.Thread(target=_end, args=(machines,), daemon=True).start()
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    here, known, numbers = ray.get_runtime_context().get_node_id(), set[str](), count(setup.workers)
    while True:
        free = available_resources_per_node()  # type: ignore[no-untyped-call]
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            name, cores = node["NodeID"], int(free.get(node["NodeID"], {}).get("CPU", 0))
            if name in known | {here} or not node["Alive"]:
                continue
            place, version = node["NodeManagerAddress"], node["Labels"].get(VERSION_LABEL)
            if version != label():
                known.add(name)
                has = f"Offsite {version}" if version else "no Offsite that it tells of"
                _say(f"machine {place} has {has}, and this one {label()}: no site is done there")
            elif cores:  # others may have them all, for now
                known.add(name)
                machines.append(_Machine(name, place, cores, setup))
                threading.Thread(target=machines[-1].lend, args=(numbers,), daemon=True).start()
        time.sleep(BEAT_S)


def _end(machines: "list[_Machine]") -> None:
    """Wait for the end of stdin, and then have each machine put away what it has of this."""
    sys.stdin.read()
    with contextlib.suppress(RayError):
        if ends := [machine.close() for machine in machines if machine.there]:
            ray.wait(ends, num_returns=len(ends), timeout=END_S)
        ray.shutdown()
    os._exit(0)


def _say(words: str) -> None:
    print(plain(words, most=1000), file=SAID, flush=True)


class _Machine:
    """Another machine, with an actor that has a pool there."""

    def __init__(self, node: str, address: str, cores: int, setup: Setup) -> None:
        self._node, self._address, self._cores, self._setup = node, address, cores, setup
        self._sending, self._lost = threading.Lock(), threading.Event()
        self._actor: Any = None

    def lend(self, numbers: Iterator[int]) -> None:
        """Begin there, and have its workers do what they are told."""
        data = Path(self._setup.data)
        files = [data] if data.is_file() else [path for path in data.rglob("*") if path.is_file()]
        try:
            elsewhere: Any = _Elsewhere
            self._actor = elsewhere.options(
                num_cpus=self._cores,
                max_concurrency=self._cores + 1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False),
            ).remote(to_json(self._setup), self._cores)
            ray.get(self._actor.open.remote())
            paths = {str(path.relative_to(data.parent)): digest_file(path) for path in files}
            self._send({digest: data.parent / path for path, digest in paths.items()})
            ray.get(self._actor.start.remote(paths))
        except (RayError, OSError) as error:
            self._lose(error)
            return
        _say(f"machine {self._address} does {self._cores} sites at a time")
        for worker in range(self._cores):
            threading.Thread(target=self._relay, args=(worker, next(numbers)), daemon=True).start()

    @property
    def there(self) -> bool:
        """Whether there is something to end."""
        return self._actor is not None and not self._lost.is_set()

    def close(self) -> Any:
        """Begin to end there; return what to wait for."""
        return self._actor.close.remote()

    def _send(self, files: Files) -> None:
        """Send what is not there of some files, and have what is there of others removed."""
        with self._sending:
            for digest in ray.get(self._actor.lacks.remote([*files])):
                for offset, piece in read_chunks(files[digest], size=PIECE_BYTES):
                    ray.get(self._actor.write.remote(digest, offset, piece))
                ray.get(self._actor.keep.remote(digest))

    def _relay(self, worker: int, number: int) -> None:
        """Hand on orders and replies of one of its workers, which has another number here, until it is lost."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._setup.socket)
            with connection.makefile("rwb") as lines:
                try:
                    self._answer(lines, worker, number)
                except (RayError, OSError) as error:
                    self._lose(error)

    def _answer(self, lines: BufferedRWPair, worker: int, number: int) -> None:
        spool, at, end = Spool(Path(self._setup.spool)).open(number), None, 0
        for line in lines:
            order = from_json(Order, line, where="order")
            if order.round:
                at, end = order.round, 0
                self._send(_files(at))
            assert at is not None, "the first order begins a round"
            before = _pack(_residuals(at, order.sites, order.previous))
            reply, updates, stays = ray.get(self._actor.work.remote(worker, line, before))
            _unpack(Path(at.residuals), stays)
            reply = from_json(Reply, reply, where="reply")
            if reply.work:
                batch = replace(reply.work.batch, worker=number, offset=end)
                reply = replace(reply, work=replace(reply.work, batch=batch))
                end += write(spool, [memoryview(updates)], end) if updates else 0
            lines.write(to_json(reply) + b"\n")
            lines.flush()

    def _lose(self, error: Exception) -> None:
        """Say what there is no more of, once of the whole machine."""
        gone, again = isinstance(error, RayActorError), "what was under way there is done again elsewhere"
        if gone and self._lost.is_set():
            return
        if gone:
            self._lost.set()
            _say(f"machine {self._address} has left the simulation; {again}")
            return
        cause = error.cause if isinstance(error, RayTaskError) else error
        _say(f"a worker of machine {self._address} was lost ({str(cause).strip() or type(cause).__name__}); {again}")


def _files(order: RoundOrder) -> dict[str, Path]:
    bundle = {entry.digest: Path(order.bundle) / entry.path for entry in order.manifest.files}
    return bundle | {task.adapter: Path(order.adapters[tier]) for tier, task in order.tasks.items()}


def _residuals(at: RoundOrder, sites: Iterable[str], numbers: Iterable[int | None]) -> list[Path]:
    """Return the files of what stages left out of updates of some sites, as far as there are any."""
    pairs = [(site, number) for site, number in zip(sites, numbers, strict=False) if number is not None]
    return [file for site, number in pairs if (file := at.residual(site, number)) and file.exists()]


def _pack(files: Iterable[Path]) -> Stays:
    return {file.name: file.read_bytes() for file in files}


def _unpack(folder: Path, stays: Stays) -> None:
    for name, left in stays.items():
        (folder / name).write_bytes(left)


@ray.remote
class _Elsewhere:
    """What another machine has of a simulation: a folder, and a pool whose workers train there."""

    def __init__(self, setup: bytes, workers: int) -> None:
        self._setup, self._workers = from_json(Setup, setup, where="setup"), workers
        self._rounds: dict[int, RoundOrder] = {}  # as they are here, by worker
        self._laying, self._stack = threading.Lock(), contextlib.ExitStack()

    def open(self) -> None:
        """Make the folder; raises OSError."""
        place = cache_folder() / "simulations"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(place)  # of others, that were killed
        self._folder = Path(mkdtemp(dir=place))
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        for name in ("files", "bundles", "residuals", "data"):
            (self._folder / name).mkdir()

    def lacks(self, digests: list[str]) -> list[str]:
        """Remove all files but some, and return the digests of those that are not here."""
        here, wanted = {path.name: path for path in self._file("").iterdir()}, {hex_of(one): one for one in digests}
        for name in here.keys() - wanted.keys():
            here[name].unlink()
        return [wanted[name] for name in sorted(wanted.keys() - here.keys())]

    def write(self, digest: str, offset: int, piece: bytes) -> None:
        """Take a piece of a file."""
        with self._file(f"{hex_of(digest)}.partial").open("wb" if offset == 0 else "ab") as file:
            file.write(piece)

    def keep(self, digest: str) -> None:
        """Take a file whose pieces are all here; raises MismatchError where they are not what was sent."""
        partial = self._file(f"{hex_of(digest)}.partial")
        partial.touch()  # of none, if it is empty
        if digest_file(partial, like=digest) != digest:
            raise MismatchError("a file has other bytes than it had when it was sent")
        partial.rename(self._file(hex_of(digest)))

    def start(self, paths: dict[str, str]) -> None:
        """Lay out the data, and start the workers; raises ResourceError."""
        self._lay_out(self._folder / "data", paths)
        setup = replace(self._setup, data=str(self._folder / "data" / Path(self._setup.data).name))
        self._pool = self._stack.enter_context(Pool(setup, self._workers, self._folder / "spool"))
        self._spool = Spool(self._folder / "spool")

    def work(self, worker: int, line: bytes, before: Stays) -> tuple[bytes, bytes, Stays]:
        """Have a worker do an order; return its reply, its updates, and what stages left out of each.

        Raises ResourceError.
        """
        order = from_json(Order, line, where="order")
        if order.round:
            self._rounds[worker] = self._begin(order.round)
            order = replace(order, round=self._rounds[worker])
        at = self._rounds[worker]
        _unpack(Path(at.residuals), before)
        try:
            reply = self._pool.ask(worker, order)
        except RunError as error:
            return to_json(Reply(fault=str(error))), b"", {}
        assert reply.work is not None, "sites were asked for"
        batch, left = reply.work.batch, _residuals(at, order.sites, repeat(at.number))
        updates, stays = read(self._spool.file(worker), batch.size, batch.offset), _pack(left)
        for file in (*left, *(Path(at.residuals) / name for name in before)):
            file.unlink()
        return to_json(reply), updates.numpy().tobytes(), stays

    def close(self) -> None:
        """End the workers, and remove what is here of the simulation."""
        self._stack.close()

    def _begin(self, order: RoundOrder) -> RoundOrder:
        """Lay out a round's files, and return it as it is here."""
        with self._laying:
            bundles, task = self._folder / "bundles", next(iter(order.tasks.values()))
            folder = bundles / hex_of(task.manifest)
            if not folder.exists():
                for other in bundles.iterdir():
                    shutil.rmtree(other)
                self._lay_out(folder, {entry.path: entry.digest for entry in order.manifest.files})
        adapters = {tier: str(self._file(hex_of(task.adapter))) for tier, task in order.tasks.items()}
        residuals = str(self._folder / "residuals") if order.residuals else ""
        return replace(order, bundle=str(folder), adapters=adapters, residuals=residuals)

    def _lay_out(self, folder: Path, paths: Mapping[str, str]) -> None:
        """Give files names in a folder, which outlive those by digest."""
        for path, digest in paths.items():
            link = folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._file(hex_of(digest)), link)

    def _file(self, name: str) -> Path:
        return self._folder / "files" / name


if __name__ == "__main__":
    from offsite.deploy.simulation import lending  # under its own name, by which Ray's processes import it

    lending.SAID = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints
    lending.main(sys.argv[1], Path(sys.argv[2]))
