"""A round of virtual sites: the clock says who is in time, workers train, and what they give is folded as live."""

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation.folding import Sent, fold
from offsite.coordinator.bundles.stored import lay_out
from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.rounds import NAMED, task_of
from offsite.coordinator.runs.steps.results import BUILD, SELECT, Folded, Part, Step
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.runs.supervisor import Lost
from offsite.coordinator.runs.versions import read_schema
from offsite.coordinator.store.journal import Journal, Key
from offsite.deploy.simulation.clock import Clock, Load, Visit
from offsite.deploy.simulation.orders import Reply, RoundOrder, SiteOrder
from offsite.deploy.simulation.pool import Pool
from offsite.deploy.simulation.spool import Layout
from offsite.kernels.schema import settle
from offsite.protos import upload
from offsite.protos.documents import document
from offsite.protos.errors import ResourceError, RunError
from offsite.protos.ranges import Amount, AtLeastZero, Count, Finite
from offsite.protos.spec import Manifest

RUN = "simulation"


@document
class Moment:
    """A round on the virtual clock."""

    begin_s: AtLeastZero
    end_s: AtLeastZero
    asked: Count  # sites
    updates: Count
    stalled: Count  # sites that were away for too long, or too slow
    failed: Count  # that gave up, or whose training ended with an error
    refused: Count  # whose policy would not have it
    bytes_down: Amount
    bytes_up: Amount
    loss: Finite | None  # mean over the tokens that were trained on
    users_per_s: AtLeastZero  # of this machine's own clock, folding included


def moment(number: int) -> Step[Moment]:
    """Return the step that tells of a round, counted from one."""
    return Step(f"clock:{number}", Moment)


class Rounds:
    """Does the rounds of a simulation; called with one that was done before a kill, it only lets its time pass."""

    def __init__(
        self,
        home: Home,
        journal: Journal,
        spec: Grant,
        pool: Pool,
        clock: Clock,
        *,
        sample: int,
        seed: int,
        tell: Callable[[int, int, int], None],
    ) -> None:
        """Take the run and what does it; `tell` is told of (round, sites done, of how many) while sites train."""
        self._home, self._journal, self._spec, self._pool, self._clock = home, journal, spec, pool, clock
        self._sample, self._seed, self._tell = sample, seed, tell
        self._passed = 0  # rounds of the clock
        self._has: dict[str, str] = {}  # site -> manifest of the bundle that it has
        self._stages = upload.make(spec.upload)
        self._newest: dict[str, int] = {}  # site -> round of its newest update, where stages feed back
        self._feeds_back = any(stage.feedback for stage in self._stages)

    def __call__(self, history: History, number: int) -> Folded:
        """Do a round, counted from zero, and return the version that it ends in; raises RunError."""
        for earlier in range(self._passed, number):
            self._recall(earlier, self._pass(history, earlier))
        begun, began_s = time.time(), self._clock.now
        visits = self._pass(history, number)
        timeline = Timeline()
        with TemporaryDirectory(dir=self._home.node.scratch) as scratch:
            with timeline.span("training"):
                replies = self._train(history, number, visits, Path(scratch))
            with timeline.span("aggregation"), _one_thread():
                folded = self._fold(history, number, visits, replies, Path(scratch))
        self._record(history, number, visits, replies, began_s, time.time() - begun)
        return Folded(**{**vars(folded), "spans": tuple(timeline)})

    # who is asked, and what becomes of it in virtual time

    def _asked(self, history: History, number: int) -> Sequence[str]:
        names = history[SELECT].names
        if not self._sample or self._sample >= len(names):
            return names
        return sorted(random.Random(f"{self._seed} sample {number}").sample(names, self._sample))

    def _pass(self, history: History, number: int) -> dict[str, Visit]:
        """Let a round pass on the clock."""
        built, bundle = history[BUILD], history.bundle(number)
        starts = history.version(number).broadcast
        size = bundle.manifest_size + bundle.bundle.bytes
        self._down: dict[str, int] = {}
        loads = {}
        for site in self._asked(history, number):
            tier = built.tiers[site]
            new = 0 if self._has.get(site) == bundle.manifest else size
            self._down[site] = new + starts[tier].size
            loads[site] = Load(self._down[site], self._spec.training.steps, built.update_sizes[tier])
        visits = self._clock.round(number, loads)
        self._has |= dict.fromkeys(visits, bundle.manifest)
        self._passed = number + 1
        return visits

    def _recall(self, number: int, visits: dict[str, Visit]) -> None:
        """Remember whose updates a round took that was done before a kill."""
        if self._feeds_back:
            done = {task.site for task in self._journal.tasks(RUN, number) if task.state == "uploaded"}
            self._newest |= dict.fromkeys(visits.keys() & done, number)

    # training

    def _train(self, history: History, number: int, visits: dict[str, Visit], scratch: Path) -> dict[str, Reply]:
        built = history[BUILD]
        order = self._order(history, number, scratch)
        sites = [
            SiteOrder(site=site, tier=built.tiers[site], previous=self._newest.get(site))
            for site, visit in visits.items()
            if visit.state == "uploaded"
        ]
        replies: dict[str, Reply] = {}
        try:
            for reply in self._pool.work(order, sites):
                replies[reply.site] = reply
                self._tell(number, len(replies), len(sites))
        except ResourceError as error:  # a worker was lost: nothing is wrong with the run, which can go on
            raise Lost(str(error)) from error
        return replies

    def _order(self, history: History, number: int, scratch: Path) -> RoundOrder:
        blobs, built, bundle = self._home.node.blobs(), history[BUILD], history.bundle(number)
        starts = history.version(number).broadcast
        folder = scratch / "bundle"
        folder.mkdir()
        manifest: Manifest = lay_out(blobs, bundle.manifest, folder)
        key = Key(RUN, number, "virtual", 0)
        tiers = sorted({*built.tiers.values()})
        residuals = self._home.root / "residuals"
        if self._feeds_back:
            residuals.mkdir(mode=0o700, exist_ok=True)
            for file in residuals.iterdir():  # of SITE.ROUND, those of older updates than the run's newest
                site, _, of = file.stem.rpartition(".")
                if int(of) < self._newest.get(site, 0):
                    file.unlink()
        return RoundOrder(
            bundle=str(folder),
            manifest=manifest,
            tasks={tier: task_of(key, self._spec, history, tier=tier) for tier in tiers},
            adapters={tier: str(blobs.path(starts[tier].digest)) for tier in tiers},
            max_norm=self._spec.max_update_norm,
            residuals=str(residuals) if self._feeds_back else "",
        )

    # folding

    def _fold(
        self, history: History, number: int, visits: dict[str, Visit], replies: dict[str, Reply], scratch: Path
    ) -> Folded:
        built, blobs = history[BUILD], self._home.node.blobs()
        last, schema = load_version(blobs, history.version(number)), read_schema(blobs, built.schema)
        settled, layouts = {}, {}
        for tier, start in last.broadcast.items():
            settled[tier] = settle(schema, {name: tensor.shape for name, tensor in start.items()})
            layouts[tier] = Layout(upload.schema_of(self._stages, settled[tier]))
        sent = []
        for site, reply in sorted(replies.items()):
            if reply.metrics:
                tier = built.tiers[site]
                place = (reply.worker, reply.offset, layouts[tier], last.broadcast[tier], settled[tier], self._stages)
                open_ = partial(self._pool.spool.opened, *place)
                sent.append(Sent(site, tier, reply.examples, reply.norm, open_))
        if len(sent) < self._spec.min_sites:
            why = {site: f"{visit.state}: {visit.message}" for site, visit in visits.items() if visit.message}
            why |= {site: f"failed: {reply.message}" for site, reply in replies.items() if reply.message}
            reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(why.items())[:NAMED])
            more = f"; and {len(why) - NAMED} more" if len(why) > NAMED else ""
            raise RunError(
                f"round {number + 1} got {len(sent)} of at least {self._spec.min_sites} updates ({reasons}{more})"
            )
        strategy = aggregation.make(self._spec.strategy.name, self._spec.strategy.settings)
        outcome = fold(strategy, last, schema, sent, spec=self._spec, tiers={*built.tiers.values()})
        if self._feeds_back:
            self._newest |= dict.fromkeys((one.site for one in sent), number)
        return Folded(
            version=store_version(blobs, scratch, outcome.version),
            lineage={site: Part(update=None, weight=weight) for site, weight in outcome.weights.items()},
            left_out=outcome.left_out,
        )

    def _record(
        self,
        history: History,
        number: int,
        visits: dict[str, Visit],
        replies: dict[str, Reply],
        begin_s: float,
        seconds: float,
    ) -> None:
        """Write how each site's task ended, as the report of any run reads it, and the round on the clock."""
        sizes, tiers = history[BUILD].update_sizes, history[BUILD].tiers
        rows: list[tuple[Key, dict[str, Any]]] = []
        counts = dict.fromkeys(("uploaded", "stalled", "failed", "refused"), 0)
        up, tokens, loss = 0, 0, 0.0
        for site, visit in visits.items():
            reply = replies.get(site)
            values: dict[str, Any] = {"state": visit.state, "message": visit.message, "bytes_up": 0, "metrics": ""}
            if reply is not None and not reply.metrics:
                values |= {"state": "refused" if reply.refused else "failed", "message": reply.message}
            elif reply is not None:
                values |= {"bytes_up": sizes[tiers[site]], "metrics": reply.metrics}
                tokens, loss = tokens + reply.tokens, loss + reply.loss * reply.tokens
            counts[values["state"]] += 1
            up += values["bytes_up"]
            rows.append((Key(RUN, number, site, visit.attempt), {**values, "bytes_down": self._down[site]}))
        self._journal.record_tasks(rows)
        done = Moment(
            begin_s=begin_s,
            end_s=self._clock.now,
            asked=len(visits),
            updates=counts["uploaded"],
            stalled=counts["stalled"],
            failed=counts["failed"],
            refused=counts["refused"],
            bytes_down=sum(self._down.values()),
            bytes_up=up,
            loss=loss / tokens if tokens else None,
            users_per_s=len(replies) / seconds,
        )
        history.record(moment(number + 1), done)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in this thread alone: for small tensors others cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def clear(home: Home) -> None:
    """Remove what only a simulation that goes on would need."""
    for folder in (home.root / "spool", home.root / "residuals"):
        shutil.rmtree(folder, ignore_errors=True)
