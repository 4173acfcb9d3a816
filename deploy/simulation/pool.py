"""The processes that virtual sites work in: one a core, forked from one that has imported what they need."""

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BufferedRWPair
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from offsite.coordinator.runs.versions import Version
from offsite.deploy.simulation.orders import FoldOrder, Order, Reply, RoundOrder, Setup, Work
from offsite.deploy.simulation.spool import Spool
from offsite.kernels.schema import Tier
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import ResourceError, RunError
from offsite.protos.processes.forks import Forked, ForkServer

BATCH = 64  # sites of one order at most: telling takes as long as nothing much, but not as long as nothing
BATCH_BYTES = 4 << 20  # of their updates, which are in memory together, at most, if they are several
WORK_S = 1.0  # that an order should take, so that people see how far it is
GROWTH = 4  # of an order beside the last one at most
START_S = 300.0  # until a worker has imported what it needs
END_S = 10.0


@dataclass(frozen=True)
class Asked:
    """Sites of one tier that are to train."""

    tier: Tier
    sites: Sequence[str]  # in the order of their names
    size: int  # bytes of an update
    newest: Mapping[str, int] = field(default_factory=dict)  # where stages feed back: the round of a site's last update

    def order(self, begin: int, end: int) -> Order:
        """Return the order to some of them."""
        sites = tuple(self.sites[begin:end])
        return Order(tier=self.tier, sites=sites, previous=tuple(map(self.newest.get, sites)) if self.newest else ())


class Todo:
    """What is left of what is asked for; any thread may take some of it."""

    def __init__(self, asked: Sequence[Asked], *, workers: int) -> None:
        self._asked, self._workers = list(asked), workers
        self._at, self._lock = 0, threading.Lock()

    def take(self, most: int) -> Order | None:
        """Return the order to the next sites: to so many at most, and to fewer where few are left for all workers."""
        with self._lock:
            while self._asked and self._at == len(self._asked[0].sites):
                self._asked, self._at = self._asked[1:], 0
            if not self._asked:
                return None
            first, begin = self._asked[0], self._at
            share = (len(first.sites) - begin) // (2 * self._workers)
            self._at += max(1, min(most, share, BATCH_BYTES // max(1, first.size)))
            return first.order(begin, self._at)

    def clear(self) -> None:
        """Let nobody take any more."""
        with self._lock:
            self._asked, self._at = [], 0


class Pool:
    """Workers, and who works on what. Which of them a site falls to changes no byte."""

    def __init__(self, setup: Setup, workers: int, folder: Path) -> None:
        """Take what all workers have in common; `with` starts and ends them."""
        self.setup = replace(setup, workers=workers, spool=str(folder))
        self._folder, self._count = folder, workers
        self._server = ForkServer(
            "offsite.deploy.simulation.worker", environment={"OMP_NUM_THREADS": "1"}, log=folder / "workers.log"
        )
        self._lines: list[BufferedRWPair] = []
        self._leashes: list[int] = []
        self._workers: list[Forked] = []
        self._threads = ThreadPoolExecutor(workers)  # each waits for a worker

    def __enter__(self) -> Self:
        """Start the workers; raises ResourceError if one does not come."""
        Spool(self._folder, self._count).clear()
        try:
            with TemporaryDirectory(prefix="offsite-") as place, socket.socket(socket.AF_UNIX) as listener:
                address = Path(place) / "workers"  # a short path, as that of a socket must be
                listener.bind(str(address))
                listener.listen()
                listener.settimeout(START_S)
                for number in range(self._count):
                    self._lines.append(self._start(number, address, listener))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, number: int, address: Path, listener: socket.socket) -> BufferedRWPair:
        """Fork a worker and return the line to it."""
        job = self._folder / f"worker-{number}.json"
        setup = replace(self.setup, socket=str(address), number=number)
        job.write_bytes(to_json(setup))
        stdin, leash = os.pipe()
        self._leashes.append(leash)
        with job.with_suffix(".log").open("wb") as log:
            try:
                self._workers.append(self._server.fork(job, {}, stdin=stdin, stdout=log.fileno(), stderr=log.fileno()))
            finally:
                os.close(stdin)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise self._lost(number) from None
        with connection:
            return connection.makefile("rwb")

    def __exit__(self, *_: object) -> None:
        """End the workers, whatever they are at."""
        for leash in self._leashes:
            os.close(leash)
        for worker in self._workers:
            worker.wait(END_S)
        self._threads.shutdown()
        for line in self._lines:  # now that nobody waits for one any more
            line.close()
        self._server.close()

    def _lost(self, number: int) -> ResourceError:
        log = self._folder / f"worker-{number}.log"
        text = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        return ResourceError(
            f"worker {number} of the simulation ended; most likely memory is missing: give it fewer --workers "
            f"({log}{': ' + text[0][:300] if text else ''})"
        )

    def work(self, order: RoundOrder, asked: Sequence[Asked]) -> Iterator[Work]:
        """Have the sites of a round train, and yield what came of some as they are done.

        Raises RunError, and ResourceError.
        """
        todo, left = Todo(asked, workers=self._count), sum(len(one.sites) for one in asked)
        works: queue.SimpleQueue[Work | Exception] = queue.SimpleQueue()

        def serve(number: int) -> None:
            try:
                first: RoundOrder | None = order
                most = 1.0
                while (some := todo.take(int(most))) is not None:
                    begin = time.monotonic()
                    reply = self._ask(number, replace(some, round=first))
                    assert reply.work is not None, "sites were asked for"
                    works.put(reply.work)
                    speed = len(some.sites) / (time.monotonic() - begin)
                    first, most = None, min(max(1.0, speed * WORK_S), GROWTH * most, BATCH)
            except Exception as error:  # goes on in the thread that asked
                works.put(error)

        for number in range(self._count):
            self._threads.submit(serve, number)
        try:
            while left:
                work = works.get()
                if isinstance(work, Exception):
                    raise work
                left -= len(work.batch.sites) + len(work.failures)
                yield work
        finally:
            todo.clear()

    def fold(self, orders: Sequence[FoldOrder]) -> list["Future[Version]"]:
        """Begin to fold a round's updates, a part in each of the first workers; raises as `work` does."""
        return [self._threads.submit(self._fold, number, order) for number, order in enumerate(orders)]

    def _fold(self, number: int, order: FoldOrder) -> Version:
        version = self._ask(number, Order(fold=order)).version
        assert version is not None, "it was asked for"
        return version

    def _ask(self, number: int, order: Order) -> Reply:
        lines = self._lines[number]
        try:
            lines.write(to_json(order) + b"\n")
            lines.flush()
            line = lines.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        if not line:
            raise self._lost(number)
        reply = from_json(Reply, line, where="reply")
        if reply.fault:
            raise ResourceError(reply.fault) if reply.resource else RunError(reply.fault)
        return reply
