"""A virtual site at work: a live site's training, policy, stages and checks, on what this process holds already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from offsite.client.site import rows, training
from offsite.client.site.engines import Ranks, join
from offsite.client.site.handout import Handout, again, load
from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.outcome import Packing
from offsite.client.site.policy import Policy
from offsite.client.site.reasons import faults
from offsite.coordinator.runs.partial import at_site, part_of, schema_of
from offsite.deploy.simulation.data import Data
from offsite.deploy.simulation.orders import RoundOrder
from offsite.deploy.simulation.spool import Block, Layout
from offsite.emulator import methods
from offsite.emulator.examples import Reading
from offsite.emulator.methods import Adapter
from offsite.emulator.parts.training import whole_schema
from offsite.kernels.schema import Tensors, Tier, groups, is_judged_by_value
from offsite.protos import tensors
from offsite.protos.errors import InputError, MismatchError, RefusedError
from offsite.protos.spec import TaskSpec, UpdateMetrics
from offsite.protos.tensors import Held
from offsite.protos.upload.admission import admit_metrics, described, judge_values

ENGINE = EngineSpec(name="plain")
NOWHERE = "virtual"  # a path that nothing is read from or written to


class Models:
    """The emulators of this process, one for each tier, with which all its virtual sites train in turn."""

    def __init__(self) -> None:
        self.ranks: Ranks = join(ENGINE, Path(NOWHERE))
        self._handouts: dict[tuple[str, Tier], Handout] = {}

    def hand_out(self, job: TrainerJob) -> Handout:
        """Return the emulator with the broadcast in it, as if nothing had trained on it before."""
        key = (job.task.manifest, job.task.tier)
        before = self._handouts.pop(key, None)  # after a fault, it is loaded anew
        self._handouts = {other: kept for other, kept in self._handouts.items() if other[0] == key[0]}
        with faults("FAULT_EMULATOR"):
            handout = again(before, job) if before else load(job)
        self._handouts[key] = handout
        return handout


@dataclass(frozen=True)
class Visit:
    """One site's task, for what trains."""

    site: str
    broadcast: Adapter  # what it starts from, not to be changed
    source: Data
    job: TrainerJob  # of all sites of its tier
    models: Models
    secret: bytes  # the site's

    @cached_property
    def task(self) -> TaskSpec:
        """What the site is asked to do."""
        return at_site(self.job.task, self.site)

    @cached_property
    def data(self) -> Reading:
        """What the site reads of its data; raises InputError."""
        with faults("FAULT_DATA"):
            return self.source.reading(self.site)


Train = Callable[[Visit], tuple[Adapter, UpdateMetrics]]


def own_training(visit: Visit) -> tuple[Adapter, UpdateMetrics]:
    """Train as a live site's trainer does, its looks at the data and at the emulator included."""
    job = replace(visit.job, task=visit.task)
    data, held_out = rows.hold_out(job, visit.data, secret=visit.secret)
    handout, ranks = visit.models.hand_out(job), visit.models.ranks
    adapter, metrics = training.tune(job, handout, data, ranks, held_out=held_out, say=_nothing, started=0.0)
    return adapter, replace(metrics, spans=(), peak_memory_bytes=0)  # which are this process's, not the site's


def _nothing(*_: Any, **__: Any) -> None:
    """A virtual site tells nobody of its steps."""


def trainer(name: str) -> Train:
    """Import what trains, by MODULE:FUNCTION; raises InputError."""
    module, _, function = name.partition(":")
    try:
        train: Train = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"train: {name} cannot be imported as MODULE:FUNCTION: {error}") from None
    return train


class TierRound:
    """What the sites of one tier have in common in a round."""

    def __init__(self, order: RoundOrder, tier: Tier, policy: Policy) -> None:
        """Read what they start from, and hold their task against the policy of all; raises OffsiteError."""
        self._task, self._max_norm = order.tasks[tier], order.max_norm
        self.broadcast = Held(tensors.load(Path(order.adapters[tier])))
        self._method = methods.make(self._task.method.name, self._task.method.settings)
        self._schema, self._part = whole_schema(self._method, self.broadcast), part_of(self._task.training)
        self._policy = policy
        self._block: Block | None = None
        self.groups: tuple[str, ...] | None = None  # of the adapter, that updates have; None: all
        if self._part.alike:
            self._take(self._task)
        self._job = TrainerJob(
            bundle=order.bundle,
            manifest=order.manifest,
            adapter=order.adapters[tier],
            anchor=order.anchors.get(tier, ""),
            data=NOWHERE,
            policy=policy,
            task=self._task,
            engine=ENGINE,
            secret=NOWHERE,
            out=NOWHERE,
        )
        self._refusal: RefusedError | None = None
        try:
            policy.check_task(self._task)
            policy.check_bundle(self._task, order.manifest)
            if self._part.alike:
                policy.check_update(self.layout.size)
        except RefusedError as error:
            self._refusal = error

    def _take(self, task: TaskSpec, chosen: tuple[int, ...] = ()) -> None:
        """Take updates of what a task trains; raises MismatchError for a choice that no site can make."""
        try:
            schema = schema_of(task, self._schema, chosen=chosen)
        except ValueError as error:
            raise MismatchError(f"{described(task)}: {error}") from error
        self.groups = tuple(groups(schema)) if self._part.partial else None
        self.packing = Packing.of(self._task, self._method, self.broadcast, schema)
        self.layout, self._block = Layout(self.packing.leaves), None

    def visit(self, site: str, source: Data, models: Models, *, secret: bytes) -> Visit:
        """Return a site's task; raises RefusedError if its policy refuses it."""
        if self._refusal:
            raise RefusedError(str(self._refusal), reason=self._refusal.reason)
        return Visit(site, self.broadcast, source, self._job, models, secret)

    def block(self, rows: int) -> Block:
        """Return an empty block for the updates of so many sites."""
        if self._block is None or len(self._block.rows) < rows:
            self._block = Block(self.layout, rows)
        self._block.count = 0
        return self._block

    def pack(
        self, visit: Visit, adapter: Adapter, metrics: UpdateMetrics, residual: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Return what leaves a site, and what stays there.

        Raises MismatchError for tensors of other names or shapes than train, RefusedError for an update too large.
        """
        what = described(self._task, visit.site)
        if not self._part.alike:
            self._take(visit.task, metrics.chosen)
            self._policy.check_update(self.layout.size)
        tensors.check_entries(Held(adapter).entries, self.packing.schema, what=what)
        if not self.packing.stages:
            return adapter, {}
        leaves, stays = Held(), Tensors()
        for packed in self.packing.pack(adapter, self.broadcast, visit.task, secret=visit.secret, residual=residual):
            leaves.update(packed.update)
            stays.update(packed.residual)
        tensors.check_entries(leaves.entries, self.packing.leaves, what=what)
        return leaves, stays

    def norms(self, block: Block) -> Sequence[float | None]:
        """Return how far each update of a block went, where that is told of all at once.

        That is where no stage has packed them, and they have no indices, bits or codes.
        """
        alone = self.packing.stages or is_judged_by_value(self.packing.schema)
        return [None] * block.count if alone else tensors.gaps(block.columns, self.broadcast)

    def admit(self, site: str, update: Held, norm: float | None, metrics: UpdateMetrics) -> float:
        """Let an update in as a coordinator does, and return how far it went; raises MismatchError."""
        admit_metrics(metrics, self._task, site=site)
        packing, what = self.packing, described(self._task, site)
        given = update, self.broadcast, packing.schema, packing.stages, packing.leaves
        return judge_values(*given, max_norm=self._max_norm, what=what, seen=norm)
