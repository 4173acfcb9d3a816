"""What another machine of a cluster has of a simulation: files by digest, and a pool whose workers train there."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from tempfile import mkdtemp

from offsite.coordinator.node import sweep
from offsite.deploy.simulation.orders import Order, Reply, RoundOrder, Setup
from offsite.deploy.simulation.pool import Pool
from offsite.deploy.simulation.spool import Spool, read
from offsite.emulator.zoo import cache_folder
from offsite.protos.chunks import digest_file, hex_of
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import MismatchError, RunError

Stays = dict[str, bytes]  # what stages left out of updates, by the names of its files


def residuals(at: RoundOrder, sites: Iterable[str], numbers: Iterable[int | None]) -> list[Path]:
    """Return the files of what stages left out of updates of some sites, as far as there are any."""
    pairs = [(site, number) for site, number in zip(sites, numbers, strict=False) if number is not None]
    return [file for site, number in pairs if (file := at.residual(site, number)) and file.exists()]


def pack(files: Iterable[Path]) -> Stays:
    """Read files that travel."""
    return {file.name: file.read_bytes() for file in files}


def unpack(folder: Path, stays: Stays) -> None:
    """Write files that came."""
    for name, left in stays.items():
        (folder / name).write_bytes(left)


class Elsewhere:
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
        unpack(Path(at.residuals), before)
        try:
            reply = self._pool.ask(worker, order)
        except RunError as error:
            return to_json(Reply(fault=str(error))), b"", {}
        assert reply.work is not None, "sites were asked for"
        batch, left = reply.work.batch, residuals(at, order.sites, repeat(at.number))
        updates, stays = read(self._spool.file(worker), batch.size, batch.offset), pack(left)
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
        anchors = {tier: str(self._file(hex_of(task.anchor))) for tier, task in order.tasks.items() if task.anchor}
        left = str(self._folder / "residuals") if order.residuals else ""
        return replace(order, bundle=str(folder), adapters=adapters, anchors=anchors, residuals=left)

    def _lay_out(self, folder: Path, paths: Mapping[str, str]) -> None:
        """Give files names in a folder, which outlive those by digest."""
        for path, digest in paths.items():
            link = folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._file(hex_of(digest)), link)

    def _file(self, name: str) -> Path:
        return self._folder / "files" / name
