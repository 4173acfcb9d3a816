"""A worker's part of a fold: some groups of tensors, of all updates of a round, in the order of the sites' names."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin
from offsite.coordinator.aggregation.folding import fold, part_of
from offsite.coordinator.aggregation.keyed import Update
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.versions import Version, read_schema
from offsite.coordinator.store.opening import open_blobs
from offsite.deploy.simulation.orders import FoldOrder
from offsite.deploy.simulation.spool import Layout, Spool, Stretch
from offsite.kernels.schema import Schema, TensorMap, Tensors, Tier, settle
from offsite.protos import upload


def fold_part(order: FoldOrder, spool: Spool) -> Version:
    """Fold a part of a round's updates on top of the last version, store what that gives, and name it."""
    scratch = Path(order.scratch)
    blobs, kept = (open_blobs(url, cache=scratch) for url in (order.blobs, order.kept))
    last, schema = load_version(blobs, order.last), read_schema(blobs, order.schema)
    strategy = aggregation.make(order.strategy.name, order.strategy.settings)
    updates = _Updates(order, spool, schema, last.broadcast)
    version = fold(strategy, last, part_of(schema, order.part, order.parts), updates, tiers=order.tiers)
    return store_version(kept, scratch, version, part=order.parts > 1)


class _Updates:
    """The updates of an order as what a fold is fed with. Of each tier the batch is in memory that is at work."""

    def __init__(self, order: FoldOrder, spool: Spool, schema: Schema, broadcast: Mapping[Tier, Tensors]) -> None:
        self._order, self._spool, self._broadcast = order, spool, broadcast
        self._stages = upload.make(order.upload)
        self._settled = {
            tier: settle(schema, {name: tensor.shape for name, tensor in start.items()})
            for tier, start in broadcast.items()
        }
        self._layouts = {
            tier: Layout(upload.schema_of(self._stages, settled)) for tier, settled in self._settled.items()
        }
        self._newest: dict[Tier, tuple[int, Stretch]] = {}

    def __iter__(self) -> Iterator[Update]:
        batches, weights = self._order.batches, self._order.weights
        places = [
            (site, weight, number, row)
            for number, (batch, some) in enumerate(zip(batches, weights, strict=True))
            for row, (site, weight) in enumerate(zip(batch.sites, some, strict=True))
            if weight is not None
        ]
        for site, weight, number, row in sorted(places):
            yield Origin(site, batches[number].tier, weight), self._open(number, row)

    def _open(self, number: int, row: int) -> AbstractContextManager[TensorMap]:
        """Open an update as the adapter that it stands for."""
        batch = self._order.batches[number]
        newest, stretch = self._newest.get(batch.tier, (None, None))
        if stretch is None or newest != number:
            file, layout = self._spool.file(batch.worker), self._layouts[batch.tier]
            stretch = Stretch(file, batch.offset, layout, len(batch.sites))
            self._newest[batch.tier] = number, stretch
        packed, settled = stretch.row(row), self._settled[batch.tier]
        return nullcontext(upload.unpack(self._stages, packed, self._broadcast[batch.tier], settled))
