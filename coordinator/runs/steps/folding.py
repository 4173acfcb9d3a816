"""Folding the updates of a round into the next version.

Threads fold some groups of tensors each, and read no others. An update whose file is as it was when the supervisor
checked its digest, minutes ago, is read once; else other threads check the next ones, or fetch them, while one is
folded. So nothing is folded that has changed since it was stored, whichever order a file has.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Generic, TypeVar

import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, folding, keyed, likeness
from offsite.coordinator.aggregation.folding import Sent, Weighing, fold_apart, weigh
from offsite.coordinator.aggregation.keyed import Share
from offsite.coordinator.aggregation.lateness import called
from offsite.coordinator.node import Node
from offsite.coordinator.runs import partial
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.orders import Aggregate, Compare, Join, Update
from offsite.coordinator.runs.steps.results import Compared, Folded, LatePart, Part
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.runs.versions import Version, read_schema
from offsite.emulator.parts import Turn
from offsite.kernels.schema import Schema, groups, only
from offsite.protos import tensors, upload
from offsite.protos.errors import InputError
from offsite.protos.spec import RunSpec
from offsite.protos.upload.files import distance, opened

AHEAD = 2  # updates that are checked while one is folded: a digest takes longer than a sum
THREADS = 4  # that fold, at most: the memory is busy with fewer than a large machine has
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
        ThreadPoolExecutor(AHEAD, thread_name_prefix="digests") as digests,
    ):
        schema, stages = read_schema(blobs, order.schema), upload.make(spec.upload)
        starts = {tier: blobs.served(sent.digest) for tier, sent in order.last.broadcast.items()}
        has = _schemas(spec, order, schema)
        whole = all(one is schema for one in has.values())
        updates = {called(update.site, update.age): update for update in order.updates}

        def start_of(update: Update) -> Path:
            return blobs.served(update.start) if update.start else starts[order.tiers[update.site]]

        def distance_of(update: Update) -> float:
            return distance(blobs.path(update.digest, update.stamp), start_of(update), has[update.site], stages)

        weighing = _weigh(spec, order, distance_of)
        last, part = load_version(blobs, order.last.bare), folding.part_of(schema, order.part, order.parts)
        taken = [updates[whom] for whom in weighing.weights]
        files = Ahead(digests, lambda one: blobs.path(one.digest, one.stamp), taken)

        def opens() -> Iterator[keyed.Update]:
            for update, weight, file in zip(taken, weighing.weights.values(), files, strict=True):
                origin, start = Origin(update.site, order.tiers[update.site], weight), start_of(update)
                yield origin, opened(file, start, has[update.site], stages)
                if update.start:  # its change since what it began from, on top of the newest
                    yield replace(origin, weight=-weight), tensors.reading(start)
                    yield origin, tensors.reading(starts[origin.tier])

        shares = {} if whole else {site: Share(weight, groups(has[site])) for site, weight in weighing.weights.items()}
        threads = min(THREADS, torch.get_num_threads())
        version = fold_apart(strategy, last, part, opens, threads, tiers=order.last.broadcast.keys(), shares=shares)
        if order.parts == 1:
            version = memory.after(blobs, spec, order.last, version, schema, number=order.round)
        stored = store_version(blobs, Path(scratch), version, part=order.parts > 1)
    return Folded(
        version=stored,
        lineage={
            one.site: Part(update=one.digest, weight=weight)
            for one, weight in zip(taken, weighing.weights.values(), strict=True)
            if not one.age
        },
        late={
            one.site: LatePart(update=one.digest, weight=weight, age=one.age)
            for one, weight in zip(taken, weighing.weights.values(), strict=True)
            if one.age
        },
        left_out={
            updates[whom].site: f"{whom}: {why}" if updates[whom].age else why
            for whom, why in weighing.left_out.items()
        },
        spans=tuple(timeline),
    )


def compare(node: Node, spec: Grant, order: Compare) -> Compared:
    """Tell how alike the updates of a round are, whose weights are given, and change nothing."""
    timeline, blobs, folded = Timeline(), node.blobs(), order.folded
    with timeline.span("aggregation"), ExitStack() as files:
        schema, stages = read_schema(blobs, folded.schema), upload.make(spec.upload)
        has = _schemas(spec, folded, schema)
        changes = []
        for update in sorted(folded.updates, key=lambda update: update.site):
            start = blobs.served(folded.last.broadcast[folded.tiers[update.site]].digest)
            file = opened(blobs.path(update.digest, update.stamp), start, has[update.site], stages)
            broadcast = files.enter_context(tensors.reading(start))
            changes.append(likeness.Change(files.enter_context(file), broadcast, frozenset(groups(has[update.site]))))
        gram = likeness.gram(changes, schema)
    sites = sorted(update.site for update in folded.updates)
    cosines = likeness.with_mean(gram, [folded.weights[site] for site in sites]) if gram is not None else []
    return Compared(cosines=dict(zip(sites, cosines, strict=False)), spans=tuple(timeline))


def _weigh(spec: Grant, order: Aggregate, distance_of: Callable[[Update], float]) -> Weighing:
    """Say what the updates weigh: as the order has it, else as the run has it, by how far they go."""
    if order.weights:
        return Weighing(dict(sorted(order.weights.items())), {})
    sent = [
        Sent(one.site, order.tiers[one.site], one.examples, distance_of(one) if one.norm is None else one.norm, one.age)
        for one in order.updates
    ]
    return weigh(sent, spec=spec)


def _schemas(spec: RunSpec, order: Aggregate, schema: Schema) -> dict[str, Schema]:
    """Return by site what of the schema its update has."""
    part, seed = partial.part_of(spec.training), spec.training.seed
    if not part.partial:
        return {update.site: schema for update in order.updates}
    return {
        update.site: only(schema, part.groups(schema, Turn(seed, order.round, update.site), update.chosen))
        for update in order.updates
    }


class Ahead(Generic[T, R]):
    """What is done of each item, in their order, for all who ask; threads do the next AHEAD meanwhile."""

    def __init__(self, threads: Executor, do: Callable[[T], R], items: Iterable[T]) -> None:
        """Take the threads, what they do, and of what."""
        self._threads, self._do, self._items = threads, do, iter(items)
        self._work: list[Future[R]] = []
        self._lock = Lock()

    def __iter__(self) -> Iterator[R]:
        """Yield the results; an item's error is raised to each who comes to it."""
        for at in count():
            with self._lock:
                for item in islice(self._items, max(0, at + AHEAD + 1 - len(self._work))):
                    self._work.append(self._threads.submit(copy_context().run, self._do, item))
            if at == len(self._work):
                return
            yield self._work[at].result()


def join(node: Node, spec: Grant, order: Join) -> Version:
    """Put the parts of a version together, have the run's memory take it, and store it whole."""
    blobs, strategy = node.blobs(), aggregation.make(spec.strategy.name, spec.strategy.settings)
    if not isinstance(strategy, aggregation.Separable):
        raise InputError(f"strategy {spec.strategy.name} folds all groups of tensors together, and joins no parts")
    version = strategy.join([load_version(blobs, part) for part in order.parts])
    version = memory.after(blobs, spec, order.last, version, read_schema(blobs, order.schema), number=order.round)
    with TemporaryDirectory(dir=node.scratch) as scratch:
        return store_version(blobs, Path(scratch), version)
