"""A worker's part of a fold: some groups of tensors, of all updates of a round, in the order of the sites' names."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin
from offsite.coordinator.aggregation.folding import fold, part_of
from offsite.coordinator.aggregation.keyed import Share, Update
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.versions import Version, read_schema
from offsite.coordinator.store.opening import open_blobs
from offsite.deploy.simulation.orders import Batch, FoldOrder
from offsite.deploy.simulation.spool import Layout, Spool, Stretch
from offsite.kernels.schema import Schema, TensorMap, Tensors, Tier, groups, only, settle
from offsite.protos import upload


def fold_part(order: FoldOrder, spool: Spool) -> Version:
    """Fold a part of a round's updates on top of the last version, store what that gives, and name it."""
    scratch = Path(order.scratch)
    blobs, kept = (open_blobs(url, cache=scratch) for url in (order.blobs, order.kept))
    last, schema = load_version(blobs, order.last), read_schema(blobs, order.schema)
    strategy = aggregation.make(order.strategy.name, order.strategy.settings)
    updates = _Updates(order, spool, schema, last.broadcast)
    part = part_of(schema, order.part, order.parts)
    version = fold(strategy, last, part, updates, tiers=order.tiers, shares=updates.shares)
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
        self._known: dict[tuple[Tier, tuple[str, ...] | None], tuple[Schema, Layout]] = {}
        self._newest: dict[Tier, tuple[int, Stretch]] = {}

    @property
    def shares(self) -> dict[str, Share] | None:
        """What each site's update has; None where all have everything."""
        if all(batch.groups is None for batch in self._order.batches):
            return None
        return {
            site: Share(weight, groups(self._of(batch)[0]))
            for batch, weights in zip(self._order.batches, self._order.weights, strict=True)
            for site, weight in zip(batch.sites, weights, strict=True)
            if weight is not None
        }

    def _of(self, batch: Batch) -> tuple[Schema, Layout]:
        """Return what updates of a batch have, and how it lies there."""
        key = batch.tier, batch.groups
        if key not in self._known:
            whole = self._settled[batch.tier]
            schema = whole if batch.groups is None else only(whole, batch.groups)
            self._known[key] = schema, Layout(upload.schema_of(self._stages, schema))
        return self._known[key]

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
            file, (_, layout) = self._spool.file(batch.worker), self._of(batch)
            stretch = Stretch(file, batch.offset, layout, len(batch.sites))
            self._newest[batch.tier] = number, stretch
        packed, (schema, _) = stretch.row(row), self._of(batch)
        return nullcontext(upload.unpack(self._stages, packed, self._broadcast[batch.tier], schema))
