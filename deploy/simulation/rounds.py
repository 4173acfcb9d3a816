"""A round of virtual sites: the clock says who is in time, workers train, and what they give is folded as live."""

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Separable
from offsite.coordinator.aggregation.folding import Sent, Weighing, weigh
from offsite.coordinator.bundles.stored import lay_out
from offsite.coordinator.home import Home
from offsite.coordinator.memory import make as make_memory
from offsite.coordinator.runs import quorum
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.partial import UpdateSizes
from offsite.coordinator.runs.rounds import NAMED, task_of
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.results import BUILD, SELECT, Folded, Part, Step
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.runs.supervisor import Lost
from offsite.coordinator.runs.versions import Version, read_schema
from offsite.coordinator.store.journal import Journal, Key
from offsite.coordinator.store.opening import open_blobs, url_of
from offsite.deploy.simulation.clock import Clock, Load, Visit
from offsite.deploy.simulation.orders import FoldOrder, RoundOrder, Work
from offsite.deploy.simulation.pool import Pool
from offsite.deploy.simulation.todo import Asked
from offsite.kernels.schema import Tier
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
    late: Count = 0  # sites that the round closed without, its quorum being in
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
        self._update_sizes: UpdateSizes | None = None
        self._newest: dict[str, int] = {}  # site -> round of its newest update, where stages feed back
        self._accumulates = make_memory(spec.memory.name, spec.memory.settings).accumulates
        self._feeds_back = any(stage.feedback for stage in self._stages)

    def __call__(self, history: History, number: int) -> Folded:
        """Do a round, counted from zero, and return the version that it ends in; raises RunError."""
        for earlier in range(self._passed, number):
            self._recall(earlier, self._pass(history, earlier))
        begun, began_s = time.time(), self._clock.now
        visits = self._pass(history, number)
        timeline = Timeline()
        with TemporaryDirectory(dir=self._home.node.scratch) as folder, _uncollected():
            scratch = Path(folder)
            with timeline.span("training"):
                works = self._train(history, number, visits, scratch)
            with timeline.span("aggregation"), _losing():
                weighing = self._weigh(number, visits, works)
                parts = self._begin_fold(history, number, works, weighing, scratch)
                done = self._record(history, number, visits, works, began_s)  # meanwhile
                version = self._join(history, number, [part.result() for part in parts], scratch)
        if self._feeds_back:
            self._newest |= dict.fromkeys((site for work in works for site in work.batch.sites), number)
        trained = sum(len(work.batch.sites) + len(work.failures) for work in works)
        history.record(moment(number + 1), replace(done, users_per_s=trained / (time.time() - begun)))
        return Folded(
            version=version,
            lineage={site: Part(update=None, weight=weight) for site, weight in weighing.weights.items()},
            left_out=weighing.left_out,
            spans=tuple(timeline),
        )

    # who is asked, and what becomes of it in virtual time

    def _asked(self, history: History, number: int) -> Sequence[str]:
        spec = replace(self._spec, sites_per_round=self._sample) if self._sample else self._spec
        return quorum.drawn(history[SELECT].names, spec, seed=f"{self._seed} sample {number}")

    def _pass(self, history: History, number: int) -> dict[str, Visit]:
        """Let a round pass on the clock."""
        built, bundle, sizes = history[BUILD], history.bundle(number), self._sizes(history)
        starts = history.version(number).broadcast
        size = bundle.manifest_size + bundle.bundle.bytes
        self._down: dict[str, int] = {}
        loads = {}
        for site in self._asked(history, number):
            tier = built.tiers[site]
            new = 0 if self._has.get(site) == bundle.manifest else size
            self._down[site] = new + starts[tier].size
            loads[site] = Load(self._down[site], self._spec.training.steps, sizes.of(tier, number, site))
        visits = self._clock.round(number, loads)
        self._has |= dict.fromkeys(visits, bundle.manifest)
        self._passed = number + 1
        return visits

    def _sizes(self, history: History) -> UpdateSizes:
        if self._update_sizes is None:
            self._update_sizes = UpdateSizes(self._home.node.blobs, self._spec, history[BUILD])
        return self._update_sizes

    def _recall(self, number: int, visits: dict[str, Visit]) -> None:
        """Remember whose updates a round took that was done before a kill."""
        if self._feeds_back:
            done = {task.site for task in self._journal.tasks(RUN, number) if task.state == "uploaded"}
            self._newest |= dict.fromkeys(visits.keys() & done, number)

    # training

    def _train(self, history: History, number: int, visits: dict[str, Visit], scratch: Path) -> list[Work]:
        """Have everybody train whose update is to come; return what came of it."""
        built = history[BUILD]
        order = self._order(history, number, scratch)
        sites: dict[Tier, list[str]] = {}
        for site in sorted(site for site, visit in visits.items() if visit.state == "uploaded"):
            sites.setdefault(built.tiers[site], []).append(site)
        alone = not self._sizes(history).part.alike
        asked = [
            Asked(tier, some, built.update_sizes[tier], alone, self._newest) for tier, some in sorted(sites.items())
        ]
        works, done, total = list[Work](), 0, sum(map(len, sites.values()))
        with _losing():
            for work in self._pool.work(order, asked):
                works.append(work)
                done += len(work.batch.sites) + len(work.failures)
                self._tell(number, done, total)
        return works

    def _order(self, history: History, number: int, scratch: Path) -> RoundOrder:
        blobs, built, bundle = self._home.node.blobs(), history[BUILD], history.bundle(number)
        starts = history.version(number).broadcast
        folder = scratch / "bundle"
        folder.mkdir()
        manifest: Manifest = lay_out(blobs, bundle.manifest, folder)
        key = Key(RUN, number, "virtual", 0)
        tiers = sorted({*built.tiers.values()})
        sizes = {tier: self._sizes(history).of(tier, number, key.site) for tier in tiers}
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
            tasks={tier: task_of(key, self._spec, history, tier=tier, size=sizes[tier]) for tier in tiers},
            adapters={tier: str(blobs.path(starts[tier].digest)) for tier in tiers},
            anchors={tier: str(blobs.path(anchor.digest)) for tier, anchor in built.anchors.items()},
            max_norm=self._spec.max_update_norm,
            residuals=str(residuals) if self._feeds_back else "",
        )

    # folding

    def _weigh(self, number: int, visits: dict[str, Visit], works: Sequence[Work]) -> Weighing:
        sent = [
            Sent(site, work.batch.tier, examples, norm)
            for work in works
            for site, examples, norm in zip(work.batch.sites, work.examples, work.norm, strict=True)
        ]
        if len(sent) < self._spec.min_sites:
            why = {site: f"{visit.state}: {visit.message}" for site, visit in visits.items() if visit.message}
            why |= {one.site: f"failed: {one.message}" for work in works for one in work.failures}
            reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(why.items())[:NAMED])
            more = f"; and {len(why) - NAMED} more" if len(why) > NAMED else ""
            raise RunError(
                f"round {number + 1} got {len(sent)} of at least {self._spec.min_sites} updates ({reasons}{more})"
            )
        return weigh(sent, spec=self._spec)

    def _begin_fold(
        self, history: History, number: int, works: Sequence[Work], weighing: Weighing, scratch: Path
    ) -> "list[Future[Version]]":
        """Have the workers fold some groups of tensors each."""
        built = history[BUILD]
        parts = min(self._pool.setup.workers, built.groups)
        whole = FoldOrder(
            strategy=self._spec.strategy,
            upload=self._spec.upload,
            last=history.version(number).bare,
            schema=built.schema,
            tiers=tuple(sorted({*built.tiers.values()})),
            blobs=self._home.node.url,
            kept=self._home.node.url if parts == 1 and not self._accumulates else url_of("file", scratch / "parts"),
            scratch="",
            batches=tuple(work.batch for work in works),
            weights=tuple(tuple(map(weighing.weights.get, work.batch.sites)) for work in works),
            parts=parts,
            part=0,
        )
        orders = []
        for part in range(parts):
            folder = scratch / f"part-{part}"
            folder.mkdir()
            orders.append(replace(whole, part=part, scratch=str(folder)))
        return self._pool.fold(orders)

    def _join(self, history: History, number: int, parts: Sequence[Version], scratch: Path) -> Version:
        """Put the parts of a version together, and have the run's memory take it."""
        if len(parts) == 1 and not self._accumulates:
            return parts[0]
        kept, blobs = open_blobs(url_of("file", scratch / "parts"), cache=scratch), self._home.node.blobs()
        strategy = aggregation.make(self._spec.strategy.name, self._spec.strategy.settings)
        with _one_thread():
            version, *more = [load_version(kept, part) for part in parts]
            if more:
                assert isinstance(strategy, Separable), "or there is one group"
                version = strategy.join([version, *more])
            schema, last = read_schema(blobs, history[BUILD].schema), history.version(number)
            done = self._spec.rounds_before + number
            version = memory.after(blobs, self._spec, last, version, schema, number=done)
        return store_version(blobs, scratch, version)

    def _record(
        self, history: History, number: int, visits: dict[str, Visit], works: Sequence[Work], began_s: float
    ) -> Moment:
        """Write how each site's task ended, as the report of any run reads it; return what the clock says of a round.

        Its speed is not known yet.
        """
        sent: dict[str, tuple[str, int, float, int]] = {}
        for work in works:
            size = work.batch.size // max(1, len(work.batch.sites))
            rows_of = zip(work.metrics, work.tokens, work.loss, repeat(size), strict=False)
            sent |= zip(work.batch.sites, rows_of, strict=False)
        failures = {one.site: one for work in works for one in work.failures}
        rows: list[tuple[Key, dict[str, Any]]] = []
        counts = dict.fromkeys(("uploaded", "stalled", "late", "failed", "refused"), 0)
        up, all_tokens, all_loss = 0, 0, 0.0
        for site, visit in visits.items():
            state, message, size, metrics = visit.state, visit.message, 0, ""
            if failure := failures.get(site):
                state, message = "refused" if failure.refused else "failed", failure.message
            elif site in sent:
                metrics, tokens, loss, size = sent[site]
                all_tokens, all_loss = all_tokens + tokens, all_loss + loss * tokens
            counts[state] += 1
            up += size
            values = {"state": state, "message": message, "bytes_up": size, "metrics": metrics}
            rows.append((Key(RUN, number, site, visit.attempt), {**values, "bytes_down": self._down[site]}))
        self._journal.record_tasks(rows)
        return Moment(
            begin_s=began_s,
            end_s=self._clock.now,
            asked=len(visits),
            updates=counts["uploaded"],
            stalled=counts["stalled"],
            late=counts["late"],
            failed=counts["failed"],
            refused=counts["refused"],
            bytes_down=sum(self._down.values()),
            bytes_up=up,
            loss=all_loss / all_tokens if all_tokens else None,
            users_per_s=0.0,
        )


@contextmanager
def _losing() -> Iterator[None]:
    """Tell that a worker was lost: nothing is wrong with the run, which can go on."""
    try:
        yield
    except ResourceError as error:
        raise Lost(str(error)) from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep what there is from being looked at for garbage: for what was imported that takes longer than some rounds."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
