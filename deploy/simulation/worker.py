"""What a worker process of a simulation does, once it has been forked (`offsite.protos.processes`)."""

import os
import socket
import traceback
from io import BufferedRWPair
from pathlib import Path

import torch

from offsite.client.site import training
from offsite.client.site.trainer import explain
from offsite.deploy.simulation.data import open_data
from offsite.deploy.simulation.orders import Order, Replies, Reply, RoundOrder, Setup, SiteOrder
from offsite.deploy.simulation.visit import Models, TierRound, trainer
from offsite.emulator.catalogue import FORMATS, METHODS, MODALITIES
from offsite.kernels.schema import Tensors, Tier
from offsite.protos import tensors
from offsite.protos.documents import from_json, plain, to_json
from offsite.protos.errors import RefusedError, ResourceError
from offsite.protos.security.draws import derive


def preload() -> None:
    """Import what virtual sites need."""
    for family in (METHODS, FORMATS, MODALITIES):
        family.preload()


def main(path: Path) -> int:
    """Answer the orders that come on a socket, a line each, until it ends."""
    setup = from_json(Setup, path.read_bytes(), where=str(path))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(setup.socket)
        with connection.makefile("rwb") as lines:
            _answer(setup, lines)
    return 0


def _answer(setup: Setup, lines: BufferedRWPair) -> None:
    worker: Worker | None = None
    for line in lines:
        order = from_json(Order, line, where="order")
        try:
            worker = worker or Worker(setup)
            if order.round:
                worker.begin(order.round)
            replies = Replies(sites=tuple(worker.work(site) for site in order.sites))
        except Exception as fault:  # of what all sites have in common
            traceback.print_exc()
            error = explain(fault)
            missing = isinstance(error, ResourceError)
            replies = Replies(fault=plain(str(error), most=2000), resource=missing)
        lines.write(to_json(replies) + b"\n")
        lines.flush()


class Worker:
    """Does the work of one virtual site after the other."""

    def __init__(self, setup: Setup) -> None:
        """Read the data, and import what trains; raises InputError."""
        torch.set_num_threads(1)  # a worker has one core, and the bytes are the same for any number of workers
        training.make_repeatable()
        self._setup, self._models = setup, Models()
        self._data = open_data(
            Path(setup.data), setup.sites or None, setup.partition, seed=setup.seed, odd_rows=setup.policy.odd_rows
        )
        self._train = trainer(setup.train)
        self._secret = derive(str(setup.seed).encode(), "virtual sites")
        self._tiers: dict[Tier, TierRound] = {}
        self._spool, self._end = os.open(setup.spool, os.O_WRONLY), 0

    def begin(self, order: RoundOrder) -> None:
        """Begin a round, which writes over the last one's updates; raises OffsiteError."""
        self._tiers = {tier: TierRound(order, tier, self._setup.policy) for tier in order.tasks}
        self._residuals = Path(order.residuals) if order.residuals else None
        self._number, self._end = next(iter(order.tasks.values())).round, 0

    def work(self, order: SiteOrder) -> Reply:
        """Do a site's task as far as its update is let in; why there is none is told as a live site's log has it.

        Raises ResourceError where memory or disk is missing.
        """
        try:
            return self._work(order)
        except Exception as fault:
            error = explain(fault)
            if isinstance(error, ResourceError):  # is missing to all
                raise error from fault
            if str(error).startswith(type(fault).__name__):  # a fault of ours, or of what trains
                traceback.print_exc()
            refused = isinstance(error, RefusedError)
            return Reply(site=order.site, refused=refused, message=plain(str(error), most=2000))

    def _work(self, order: SiteOrder) -> Reply:
        tier = self._tiers[order.tier]
        visit = tier.visit(order.site, self._data, self._models)
        adapter, metrics = self._train(visit)
        residual = self._residual(order.site, order.previous)
        update, stays = tier.pack(
            visit, adapter, derive(self._secret, order.site) if tier.packing.stages else b"", residual
        )
        norm = tier.admit(order.site, update, metrics)
        if self._residuals:
            tensors.save(self._file(order.site, self._number), stays)
        tier.layout.write(self._spool, self._end, update)
        offset, self._end = self._end, self._end + tier.layout.size
        return Reply(
            site=order.site,
            metrics=to_json(metrics).decode(),
            examples=metrics.examples,
            tokens=metrics.tokens,
            loss=metrics.loss,
            norm=norm,
            worker=self._setup.number,
            offset=offset,
        )

    def _residual(self, site: str, previous: int | None) -> Tensors:
        """Return what stages left out of the last update of a site that the run took."""
        if self._residuals is None or previous is None:
            return {}
        return tensors.load(self._file(site, previous))

    def _file(self, site: str, number: int) -> Path:
        assert self._residuals is not None, "a stage feeds back"
        return self._residuals / f"{site}.{number}.safetensors"
