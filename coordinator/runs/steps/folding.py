"""Folding the updates of a round into the next version.

Each update is read twice, the second time from the system's cache: threads check the digests of the next ones, or fetch
them, while one is folded. So nothing is folded that has changed since it was stored, whichever order a file has.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, folding
from offsite.coordinator.aggregation.folding import Sent, fold, weigh
from offsite.coordinator.aggregation.keyed import Share
from offsite.coordinator.node import Node
from offsite.coordinator.runs import partial
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.orders import Aggregate, Join
from offsite.coordinator.runs.steps.results import Folded, Part
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.runs.versions import Version, read_schema
from offsite.emulator.parts import Turn
from offsite.kernels.schema import Schema, groups, only
from offsite.protos import upload
from offsite.protos.errors import InputError
from offsite.protos.spec import RunSpec
from offsite.protos.upload.files import distance, opened

AHEAD = 2  # updates that are checked while one is folded: a digest takes longer than a sum
T = TypeVar("T")
R = TypeVar("R")


def aggregate(node: Node, spec: Grant, order: Aggregate) -> Folded:
    """Fold the updates of a round, in the order of the sites' names, and store the next version, or a part of it.

    Those far larger than the others are left out, and named; raises RunError if too few are left.
    """
    timeline = Timeline()
    blobs = node.blobs()
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    with (
        timeline.span("aggregation"),
        TemporaryDirectory(dir=node.scratch) as scratch,
        ThreadPoolExecutor(AHEAD, thread_name_prefix="digests") as threads,
    ):
        schema, stages = read_schema(blobs, order.schema), upload.make(spec.upload)
        starts = {tier: blobs.served(sent.digest) for tier, sent in order.last.broadcast.items()}
        has = _schemas(spec, order, schema)
        whole = all(one is schema for one in has.values())
        sent = []
        for update in order.updates:
            tier, norm = order.tiers[update.site], update.norm
            if norm is None:
                norm = distance(blobs.path(update.digest), starts[tier], has[update.site], stages)
            sent.append(Sent(update.site, tier, update.examples, norm))
        last, part = load_version(blobs, order.last.bare), folding.part_of(schema, order.part, order.parts)
        weighing, digests = weigh(sent, spec=spec), {update.site: update.digest for update in order.updates}
        files = ahead(threads, blobs.path, [digests[site] for site in weighing.weights])
        origins = [Origin(site, order.tiers[site], weight) for site, weight in weighing.weights.items()]
        updates = (
            (origin, opened(file, starts[origin.tier], has[origin.site], stages))
            for origin, file in zip(origins, files, strict=True)
        )
        shares = {} if whole else {site: Share(weight, groups(has[site])) for site, weight in weighing.weights.items()}
        version = fold(strategy, last, part, updates, tiers={*order.tiers.values()}, shares=shares)
        if order.parts == 1:
            version = memory.after(blobs, spec, order.last, version, schema, number=order.round)
        stored = store_version(blobs, Path(scratch), version, part=order.parts > 1)
    return Folded(
        version=stored,
        lineage={site: Part(update=digests[site], weight=weight) for site, weight in weighing.weights.items()},
        left_out=weighing.left_out,
        spans=tuple(timeline),
    )


def _schemas(spec: RunSpec, order: Aggregate, schema: Schema) -> dict[str, Schema]:
    """Return by site what of the schema its update has."""
    part, seed = partial.part_of(spec.training), spec.training.seed
    if not part.partial:
        return {update.site: schema for update in order.updates}
    return {
        update.site: only(schema, part.groups(schema, Turn(seed, order.round, update.site), update.chosen))
        for update in order.updates
    }


def ahead(threads: Executor, do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what is done of each item in their order; threads do the next AHEAD meanwhile."""
    waiting = deque[Future[R]]()
    for item in items:
        waiting.append(threads.submit(copy_context().run, do, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def join(node: Node, spec: Grant, order: Join) -> Version:
    """Put the parts of a version together, have the run's memory take it, and store it whole."""
    blobs, strategy = node.blobs(), aggregation.make(spec.strategy.name, spec.strategy.settings)
    if not isinstance(strategy, aggregation.Separable):
        raise InputError(f"strategy {spec.strategy.name} folds all groups of tensors together, and joins no parts")
    version = strategy.join([load_version(blobs, part) for part in order.parts])
    version = memory.after(blobs, spec, order.last, version, read_schema(blobs, order.schema), number=order.round)
    with TemporaryDirectory(dir=node.scratch) as scratch:
        return store_version(blobs, Path(scratch), version)
