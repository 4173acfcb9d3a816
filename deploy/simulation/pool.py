"""The processes that virtual sites work in: one a core, forked from one that has imported what they need."""

import os
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BufferedRWPair
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from offsite.deploy.simulation.orders import Order, Replies, Reply, RoundOrder, Setup, SiteOrder
from offsite.deploy.simulation.spool import Spool
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import ResourceError, RunError
from offsite.protos.processes.forks import Forked, ForkServer

BATCH = 32  # sites of one order at most: telling takes as long as nothing much, but not as long as nothing
START_S = 300.0  # until a worker has imported what it needs
END_S = 10.0


class Pool:
    """Workers, and who works on what. Which of them a site falls to changes no byte."""

    def __init__(self, setup: Setup, workers: int, folder: Path) -> None:
        """Take what all workers have in common; `with` starts and ends them."""
        self._setup, self._folder, self._count = setup, folder, workers
        self.spool = Spool(folder, workers)
        self._server = ForkServer(
            "offsite.deploy.simulation.worker", environment={"OMP_NUM_THREADS": "1"}, log=folder / "workers.log"
        )
        self._lines: list[BufferedRWPair] = []
        self._leashes: list[int] = []
        self._workers: list[Forked] = []

    def __enter__(self) -> Self:
        """Start the workers; raises ResourceError if one does not come."""
        self.spool.clear()
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
        setup = replace(self._setup, socket=str(address), number=number, spool=str(self.spool.paths[number]))
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

    def work(self, order: RoundOrder, sites: Sequence[SiteOrder]) -> Iterator[Reply]:
        """Have sites train, and yield what became of each as it is done; raises RunError, and ResourceError."""
        size = max(1, min(BATCH, len(sites) // (4 * self._count)))
        batches: queue.SimpleQueue[tuple[SiteOrder, ...]] = queue.SimpleQueue()
        for at in range(0, len(sites), size):
            batches.put(tuple(sites[at : at + size]))
        replies: queue.SimpleQueue[tuple[Reply, ...] | Exception] = queue.SimpleQueue()
        stop = threading.Event()

        def serve(number: int) -> None:
            try:
                first: RoundOrder | None = order
                while not stop.is_set():
                    try:
                        batch = batches.get_nowait()
                    except queue.Empty:
                        return
                    replies.put(self._ask(number, Order(round=first, sites=batch)))
                    first = None
            except Exception as error:  # goes on in the thread that asked
                replies.put(error)

        threads = [threading.Thread(target=serve, args=(number,), daemon=True) for number in range(self._count)]
        for thread in threads:
            thread.start()
        try:
            left = len(sites)
            while left:
                some = replies.get()
                if isinstance(some, Exception):
                    raise some
                left -= len(some)
                yield from some
        finally:
            stop.set()

    def _ask(self, number: int, order: Order) -> tuple[Reply, ...]:
        lines = self._lines[number]
        try:
            lines.write(to_json(order) + b"\n")
            lines.flush()
            line = lines.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        if not line:
            raise self._lost(number)
        replies = from_json(Replies, line, where="replies")
        if replies.fault:
            raise ResourceError(replies.fault) if replies.resource else RunError(replies.fault)
        return replies.sites
