"""The processes that virtual sites work in: one a core, forked from one that has imported what they need.

Workers of other machines may take part in the training (`machines.py`).
"""

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from io import BufferedRWPair
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from offsite.coordinator.runs.versions import Version
from offsite.deploy.simulation.orders import FoldOrder, Order, Reply, RoundOrder, Setup, Work
from offsite.deploy.simulation.spool import Spool
from offsite.deploy.simulation.todo import Asked, Todo
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import ResourceError, RunError
from offsite.protos.processes.forks import Forked, ForkServer

BATCH = 64  # sites of one order at most: telling takes as long as nothing much, but not as long as nothing
WORK_S = 1.0  # that an order should take, so that people see how far it is
GROWTH = 4  # of an order beside the last one at most
START_S = 300.0  # until a worker has imported what it needs
END_S = 10.0

Ask = Callable[[Order], Reply]


class Line:
    """The line to a worker, on which it answers one order after the other."""

    def __init__(self, lines: BufferedRWPair) -> None:
        """Take both its ends."""
        self._lines = lines

    def ask(self, order: Order) -> Reply:
        """Have an order done; raises EOFError where the worker was lost, RunError, and ResourceError."""
        try:
            self._lines.write(to_json(order) + b"\n")
            self._lines.flush()
            line = self._lines.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        if not line:
            raise EOFError
        reply = from_json(Reply, line, where="reply")
        if reply.fault:
            raise ResourceError(reply.fault) if reply.resource else RunError(reply.fault)
        return reply

    def close(self) -> None:
        """Let go of it, once nobody waits for an answer any more."""
        with contextlib.suppress(BrokenPipeError):
            self._lines.close()


class Training:
    """A round's training, to which any number of workers come: each does what is left, order by order."""

    def __init__(self, order: RoundOrder, asked: Sequence[Asked], *, workers: int) -> None:
        """Take what there is to do."""
        self._round, self.todo = order, Todo(asked, workers=workers)
        self._left = sum(len(one.sites) for one in asked)
        self._works: queue.SimpleQueue[Work | Exception] = queue.SimpleQueue()

    def serve(self, ask: Ask) -> None:
        """Have a worker take part until all is done, or it is lost (EOFError): then others do what it was at."""
        first: RoundOrder | None = self._round
        most = 1.0
        while (some := self.todo.take(int(most))) is not None:
            begin = time.monotonic()
            try:
                work = ask(replace(some, round=first)).work
                assert work is not None, "sites were asked for"
            except EOFError:
                self.todo.give_back(some)
                return
            except Exception as error:  # goes on in the thread that asked
                self._works.put(error)
                return
            self._works.put(work)
            self.todo.end()
            speed = len(some.sites) / (time.monotonic() - begin)
            first, most = None, min(max(1.0, speed * WORK_S), GROWTH * most, BATCH)

    def __iter__(self) -> Iterator[Work]:
        """Yield what came of some sites as they are done."""
        while self._left:
            work = self._works.get()
            if isinstance(work, Exception):
                raise work
            self._left -= len(work.batch.sites) + len(work.failures)
            yield work


class Pool:
    """Workers, and who works on what. Which of them a site falls to changes no byte."""

    def __init__(self, setup: Setup, workers: int, folder: Path) -> None:
        """Take what all workers have in common; `with` starts and ends them."""
        self.setup = replace(setup, workers=workers, spool=str(folder))
        self._folder, self._count = folder, workers
        self._server = ForkServer(
            "offsite.deploy.simulation.worker", environment={"OMP_NUM_THREADS": "1"}, log=folder / "workers.log"
        )
        self._lines: list[Line] = []
        self._others: list[Line] = []  # to workers of other machines
        self._training: Training | None = None  # that they may join
        self._lock = threading.Lock()
        self._leashes: list[int] = []
        self._workers: list[Forked] = []
        self._threads = ThreadPoolExecutor(workers)  # each waits for a worker

    def __enter__(self) -> Self:
        """Start the workers; raises ResourceError if one does not come."""
        Spool(self._folder).clear()
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

    def _start(self, number: int, address: Path, listener: socket.socket) -> Line:
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
            return Line(connection.makefile("rwb"))

    def __exit__(self, *_: object) -> None:
        """End the workers, whatever they are at."""
        for leash in self._leashes:
            os.close(leash)
        for worker in self._workers:
            worker.wait(END_S)
        self._threads.shutdown()
        for line in (*self._lines, *self._others):  # now that nobody waits for one any more
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
        with self._lock:
            training = self._training = Training(order, asked, workers=self._count + len(self._others))
            others = list(self._others)
        for number in range(self._count):
            self._threads.submit(training.serve, partial(self.ask, number))
        for line in others:
            self._send(line, training)
        try:
            yield from training
        finally:
            self._training = None
            training.todo.clear()

    def join(self, line: Line) -> None:
        """Have a worker of another machine take part in this round, and in all that follow until it is lost."""
        with self._lock:
            self._others.append(line)
            training = self._training
        if training:
            training.todo.join()
            self._send(line, training)

    def _send(self, line: Line, training: Training) -> None:
        threading.Thread(target=training.serve, args=(partial(self._ask_other, line),), daemon=True).start()

    def _ask_other(self, line: Line, order: Order) -> Reply:
        try:
            return line.ask(order)
        except EOFError:
            with self._lock:
                self._others.remove(line)
            line.close()
            raise

    def fold(self, orders: Sequence[FoldOrder]) -> list["Future[Version]"]:
        """Begin to fold a round's updates, a part in each of the first workers; raises as `work` does."""
        return [self._threads.submit(self._fold, number, order) for number, order in enumerate(orders)]

    def _fold(self, number: int, order: FoldOrder) -> Version:
        version = self.ask(number, Order(fold=order)).version
        assert version is not None, "it was asked for"
        return version

    def ask(self, number: int, order: Order) -> Reply:
        """Have one of this machine's workers do an order; raises RunError, and ResourceError."""
        try:
            return self._lines[number].ask(order)
        except EOFError:
            raise self._lost(number) from None
