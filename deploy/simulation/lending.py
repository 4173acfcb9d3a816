"""The process that speaks to a Ray cluster for a simulation: it lends it the cores of the other machines.

On each that fits there is an actor with a pool of its own. To the simulation each of its workers is a line on which
orders go and replies come, as to its own ones. In between, this process sends the files that orders name, by digest,
and puts the updates that come back into a spool file here. It ends with its stdin, and the actors with it.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BufferedRWPair
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offsite.coordinator.cluster.view import VERSION_LABEL, label
from offsite.deploy.simulation.elsewhere import Elsewhere, pack, residuals, unpack
from offsite.deploy.simulation.orders import Order, Reply, RoundOrder, Setup
from offsite.deploy.simulation.spool import Spool, write
from offsite.protos.chunks import digest_file, read_chunks
from offsite.protos.documents import from_json, plain, to_json

BEAT_S = 2.0
END_S = 10.0
PIECE_BYTES = 32 << 20  # of a file, on its way

Files = Mapping[str, Path]  # by digest
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
            elsewhere: Any = ray.remote(Elsewhere)
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
            self._lost.set()
            _say(f"machine {self._address} takes no part: {_cause(error)}")
            if self._actor is not None:
                ray.kill(self._actor)  # which has its cores
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
            before = pack(residuals(at, order.sites, order.previous))
            reply, updates, stays = ray.get(self._actor.work.remote(worker, line, before))
            unpack(Path(at.residuals), stays)
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
        _say(f"a worker of machine {self._address} was lost ({_cause(error)}); {again}")


def _cause(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return plain(str(cause).strip().partition("\n")[0] or type(cause).__name__, most=300)


def _files(order: RoundOrder) -> dict[str, Path]:
    bundle = {entry.digest: Path(order.bundle) / entry.path for entry in order.manifest.files}
    adapters = {task.adapter: Path(order.adapters[tier]) for tier, task in order.tasks.items()}
    anchors = {task.anchor: Path(order.anchors[tier]) for tier, task in order.tasks.items() if task.anchor}
    return bundle | adapters | anchors


if __name__ == "__main__":
    from offsite.deploy.simulation import lending  # under its own name, by which Ray's processes import it

    lending.SAID = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints
    lending.main(sys.argv[1], Path(sys.argv[2]))
