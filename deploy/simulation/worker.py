"""What a worker process of a simulation does, once it has been forked (`offsite.protos.processes`)."""

import socket
import traceback
from io import BufferedRWPair
from itertools import zip_longest
from pathlib import Path

import torch

from offsite.client.site import training
from offsite.client.site.trainer import explain
from offsite.deploy.simulation.data import open_data
from offsite.deploy.simulation.folding import fold_part
from offsite.deploy.simulation.orders import Batch, Failure, Order, Reply, RoundOrder, Setup, Work
from offsite.deploy.simulation.spool import Block, Spool
from offsite.deploy.simulation.visit import Models, TierRound, trainer
from offsite.emulator.catalogue import FORMATS, METHODS, MODALITIES, OBJECTIVES, OPTIMISERS
from offsite.kernels.schema import Tensors, Tier
from offsite.protos import tensors
from offsite.protos.documents import from_json, plain, to_json
from offsite.protos.errors import RefusedError, ResourceError
from offsite.protos.security.draws import derive
from offsite.protos.spec import UpdateMetrics


def preload() -> None:
    """Import what virtual sites need."""
    for family in (METHODS, FORMATS, MODALITIES, OBJECTIVES, OPTIMISERS):
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
            reply = worker.answer(order)
        except Exception as fault:  # of what all sites have in common
            traceback.print_exc()
            error = explain(fault)
            missing = isinstance(error, ResourceError)
            reply = Reply(fault=plain(str(error), most=2000), resource=missing)
        lines.write(to_json(reply) + b"\n")
        lines.flush()


class Worker:
    """Does the work of one virtual site after the other."""

    def __init__(self, setup: Setup) -> None:
        """Read the data, and import what trains; raises InputError."""
        torch.set_num_threads(1)  # a worker has one core, and the bytes are the same for any number of workers
        training.make_repeatable()
        self._setup, self._models = setup, Models()
        self._data = open_data(
            Path(setup.data),
            setup.sites or None,
            setup.partition,
            seed=setup.seed,
            odd_rows=setup.policy.odd_rows,
            objective=setup.objective,
        )
        self._train = trainer(setup.train)
        self._secret = derive(str(setup.seed).encode(), "virtual sites")
        self._tiers: dict[Tier, TierRound] = {}
        self._spool = Spool(Path(setup.spool))
        self._file, self._end = self._spool.open(setup.number), 0

    def answer(self, order: Order) -> Reply:
        """Do what is asked for; raises OffsiteError where that cannot be done for any site."""
        if order.fold:
            return Reply(version=fold_part(order.fold, self._spool))
        if order.round:
            self.begin(order.round)
        return Reply(work=self.work(order))

    def begin(self, order: RoundOrder) -> None:
        """Begin a round, which writes over the last one's updates; raises OffsiteError."""
        self._tiers = {tier: TierRound(order, tier, self._setup.policy) for tier in order.tasks}
        self._round, self._end = order, 0

    def work(self, order: Order) -> Work:
        """Do the tasks of sites, as far as their updates are let in, and why there is none of some.

        Raises ResourceError where memory or disk is missing.
        """
        tier, failures = self._tiers[order.tier], list[Failure]()
        trained: list[tuple[str, UpdateMetrics]] = []
        block: Block | None = None
        for site, previous in zip_longest(order.sites, order.previous):
            try:
                update, metrics = self._train_one(tier, site, previous)
                block = block or tier.block(len(order.sites))  # before, no one knows what a site chooses to train
                block.add(update)
                trained.append((site, metrics))
            except Exception as fault:
                failures.append(_failure(site, fault))
        norms, offset = _let_in(tier, block, trained, failures) if block else {}, self._end
        size = block.write(self._file, self._end) if block else 0
        self._end += size
        let_in = [trained[row] for row in norms]
        return Work(
            batch=Batch(
                worker=self._setup.number,
                offset=offset,
                size=size,
                tier=order.tier,
                sites=tuple(site for site, _ in let_in),
                groups=tier.groups,
            ),
            metrics=tuple(to_json(metrics).decode() for _, metrics in let_in),
            examples=tuple(metrics.examples for _, metrics in let_in),
            tokens=tuple(metrics.tokens for _, metrics in let_in),
            loss=tuple(metrics.loss for _, metrics in let_in),
            norm=tuple(norms.values()),
            failures=tuple(failures),
        )

    def _train_one(self, tier: TierRound, site: str, previous: int | None) -> tuple[Tensors, UpdateMetrics]:
        """Do a site's task; return what leaves it."""
        visit = tier.visit(site, self._data, self._models, secret=derive(self._secret, site))
        adapter, metrics = self._train(visit)
        update, stays = tier.pack(visit, adapter, metrics, self._residual(site, previous))
        if file := self._round.residual(site, self._round.number):
            tensors.save(file, stays)
        return update, metrics

    def _residual(self, site: str, previous: int | None) -> Tensors:
        """Return what stages left out of the last update of a site that the run took."""
        file = None if previous is None else self._round.residual(site, previous)
        return tensors.load(file) if file else {}


def _let_in(
    tier: TierRound, block: Block, trained: list[tuple[str, UpdateMetrics]], failures: list[Failure]
) -> dict[int, float]:
    """Keep the updates of a block that may be let in; return how far each went, by what its row was."""
    norms: dict[int, float] = {}
    for row, ((site, metrics), norm) in enumerate(zip(trained, tier.norms(block), strict=True)):
        try:
            norms[row] = tier.admit(site, block.rows[row], norm, metrics)
        except Exception as fault:
            failures.append(_failure(site, fault))
    block.keep([*norms])
    return norms


def _failure(site: str, fault: Exception) -> Failure:
    """Tell why a site gave no update, as a live site's log has it; raises ResourceError for what is missing to all."""
    error = explain(fault)
    if isinstance(error, ResourceError):
        raise error from fault
    if str(error).startswith(type(fault).__name__):  # a fault of ours, or of what trains
        traceback.print_exception(fault)
    return Failure(site=site, refused=isinstance(error, RefusedError), message=plain(str(error), most=2000))
