"""One round of a run: tasks are offered to its sites, and waited for until each has given an update or cannot."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace

from offsite.coordinator.home import Home
from offsite.coordinator.runs import quorum
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.partial import UpdateSizes, at_site
from offsite.coordinator.runs.replaying import kept
from offsite.coordinator.runs.report import training
from offsite.coordinator.runs.steps.orders import Update
from offsite.coordinator.runs.steps.results import BUILD, Closing, Folded, Roster, closing, roster
from offsite.coordinator.store.blobs import Blobs, Stamp
from offsite.coordinator.store.journal import OPEN, Journal, Key, Row
from offsite.emulator.catalogue import METHODS
from offsite.kernels.schema import Tier
from offsite.protos import upload
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import MismatchError, NotFoundError, RunError
from offsite.protos.events import RoundBegun, SiteState
from offsite.protos.security.signing import sign
from offsite.protos.spec import TaskSpec, UpdateMetrics

ATTEMPTS = 2  # a site that fails a task is asked once more
CHECKS = 4  # updates whose digests are checked at once, on as many cores as there are
TIME_EVERY_S = 1.0
FOREVER = float("inf")
PRESENT_S = 20.0  # a site is heard every 2 s while it waits or works
LONG_S = 60.0
NAMED = 20  # sites that an error names, at most


class Round:
    """The tasks of one round, counted from zero; all it knows of them is in the journal."""

    def __init__(self, home: Home, journal: Journal, run: str, spec: Grant, history: History, number: int) -> None:
        self._home, self._journal, self._run, self._spec = home, journal, run, spec
        self._history, self._number = history, number
        self._sizes = UpdateSizes(home.blobs, spec, history[BUILD])
        self._timed = 0.0  # when it was last looked who is out of time
        self._quorum, self._busy = quorum.of(spec), set[str]()  # who is asked once done with an earlier round
        self._outs = set[str]()
        self.until = FOREVER  # when it closes, whoever is missing

    def open(self) -> None:
        """Write down who is asked, and offer each a task; what was written before stands."""
        opens = roster(self._number + 1)
        if self._history.get(opens) is None:
            drawn = self._draw()
            begun = RoundBegun(round=self._number + 1, sites=len(drawn.tiers), joined=tuple(drawn.joined))
            self._history.record(opens, drawn, begun)
        self._began = next(
            event.at
            for event in self._journal.events(self._run, kind=RoundBegun.kind)
            if event.round == self._number + 1
        )
        self._busy = {*self._history[opens].tiers}
        self._ask()

    def _draw(self) -> Roster:
        """Return who is asked: all who take part, with those who have come, or as many of them as the run draws."""
        members = self._history.members(self._number)
        joined = self._joining(members)
        tiers = members | joined
        there = tiers.keys() - self._journal.outs(self._run).keys()
        if self._spec.sites_per_round:
            there -= self._journal.busy(self._run, before=self._number)
        names = quorum.drawn(sorted(there), self._spec, seed=f"{self._spec.training.seed} sample {self._number}")
        return Roster(tiers={name: tiers[name] for name in names}, joined=joined)

    def _joining(self, members: Collection[str]) -> dict[str, Tier]:
        """Return by site what it is to train, of those that are here and have not taken part yet."""
        if self._spec.replays:  # those who came to the run that this one does again
            return dict(self._spec.replays.joined.get(self._number, {}))
        if not (self._spec.join and self._number):
            return {}
        method = METHODS.make(self._spec.method.name, self._spec.method.settings)
        most = self._home.policy().max_sites if self._spec.role == "researcher" else None
        came = [name for name in self._journal.present(time.time() - PRESENT_S) if name not in members]
        tiers = {name: method.tier_at(name) for name in came[: None if most is None else max(0, most - len(members))]}
        return {name: tier for name, tier in tiers.items() if tier in self._history.version(self._number).broadcast}

    def _ask(self) -> None:
        """Offer a task to those who were not asked yet, unless they are at one of an earlier round."""
        busy = self._journal.busy(self._run, before=self._number) if self._spec.staleness else set()
        self._offer((site, 0) for site in sorted(self._busy - busy))
        self._busy &= busy

    def look(self, *, since: float) -> bool:
        """Tell whether there is something to wait for.

        A site that failed is asked once more, and one that got stuck is left out. Before `since`, nobody was there to
        whom sites could have said that they get further.
        """
        standing = self._journal.standing(self._run, self._number, attempts=ATTEMPTS)
        outs = self._heed_outs()
        failed = [task for task in standing.failed if task.site not in outs]
        self._offer((task.site, task.attempt + 1) for task in failed)
        self.until = self._end(since)
        if self._busy and self.until == FOREVER:
            self._ask()
        waits = standing.open > self._leave_out(since) or bool(failed)
        return waits and time.time() < self.until

    def _heed_outs(self) -> Collection[str]:
        """Return the sites that take part no longer, and ask nothing more of them."""
        outs = self._journal.outs(self._run)
        for site in outs.keys() - self._outs:
            self._journal.end_tasks(self._run, site, outs[site])  # one may have been offered while it went out
        self._outs = {*outs}
        self._busy -= self._outs
        return outs

    def note(self) -> str:
        """Say who holds up a round that waits for all, once most have been in for as long as they took, and LONG_S."""
        asked = len(self._history.tiers(self._number))
        came = self._journal.arrival(self._run, self._number, asked // 2 + 1) if self._quorum is None else None
        if came is None or time.time() < came + (came - self._began) + LONG_S:
            return ""
        tasks = self._journal.tasks(self._run, self._number)
        late = [task.site for task in tasks if task.state in OPEN]
        whom = ", ".join(late[:NAMED]) + (f" and {len(late) - NAMED} more" if len(late) > NAMED else "")
        goes = f"{asked - len(late)} of {asked} are done, and a quorum would let it go on"
        return f"round {self._number + 1} waits for {whom}; {goes}" if late else ""

    def _end(self, since: float) -> float:
        """Return when the round closes, in seconds since the epoch: FOREVER before its quorum is in."""
        if self._quorum is None:
            return FOREVER
        at = self._journal.arrival(self._run, self._number, self._quorum.updates)
        return FOREVER if at is None else self._quorum.end(self._began, at, since=since)

    def _leave_out(self, since: float) -> int:
        """Close, now and then, the tasks that are out of time; return how many."""
        now, spec = time.time(), self._spec
        if now - self._timed < TIME_EVERY_S:
            return 0
        self._timed = now
        moved_before = now - spec.stall_s
        overdue = self._journal.overdue(
            self._run,
            (self._oldest, self._number),
            moved_before=moved_before if since < moved_before else 0.0,
            begun_before=now - spec.task_s,
        )
        for task in overdue:
            late = f"was not done {spec.task_s:.0f} s after it took its task"
            stuck = f"got no further for {spec.stall_s:.0f} s"
            self._journal.close_task(self._key(task), "stalled", late if task.late else stuck)
        return sum(task.round == self._number for task in overdue)

    @property
    def _oldest(self) -> int:
        """The first round whose late updates may be in this one."""
        return max(0, self._number - self._spec.staleness)

    def close(self) -> tuple[Update, ...] | None:
        """Decide on the updates of a round that nobody works on any more; None if a site is asked again for one.

        Raises RunError if they are too few.
        """
        tasks = list({task.site: task for task in self._journal.tasks(self._run, self._number)}.values())  # the last
        outs = self._journal.outs(self._run)
        done = [task for task in (*tasks, *self._late()) if task.state == "uploaded" and task.site not in outs]
        stamps = self._stamps(done)
        if len(stamps) < len(done):
            return None
        if len(done) < self._spec.min_sites:
            if self._busy:  # with a task of an earlier round, whose update is to come
                return None
            why = {task.site: f"{task.state}: {task.message}" for task in tasks if task.state != "uploaded"}
            raise self._too_few(len(done), why | {site: f"out: {reason}" for site, reason in outs.items()})
        updates = tuple(_update(task, self._number) for task in done)
        self._history.record(closing(self._number + 1), Closing(updates=updates), *self._news(tasks))
        return tuple(replace(update, stamp=stamp) for update, stamp in zip(updates, stamps, strict=True))

    def _too_few(self, updates: int, why: Mapping[str, str]) -> RunError:
        """Say by site why there are no more updates."""
        reasons = [f"{site}: {reason}" for site, reason in sorted(why.items())]
        more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
        told = "; ".join(reasons[:NAMED] + more)
        return RunError(f"round {self._number + 1} got {updates} of at least {self._spec.min_sites} updates ({told})")

    def _late(self) -> list[Row]:
        """Return the tasks of earlier rounds whose updates came after these had closed, and are in no other."""
        earlier = range(self._oldest, self._number)
        entered = self._entered(earlier)
        tasks = [task for round in earlier for task in self._journal.tasks(self._run, round)]
        return [task for task in tasks if task.state == "uploaded" and (task.round, task.site) not in entered]

    def _entered(self, rounds: Iterable[int]) -> set[tuple[int, str]]:
        """Return (round, site) of the updates that are in some rounds: of which round, and of whom."""
        closed = [(round, self._history[closing(round + 1)]) for round in rounds]
        return {(round - update.age, update.site) for round, end in closed for update in end.updates}

    def _news(self, tasks: Iterable[Row]) -> list[SiteState]:
        """Tell of the sites whose updates may be in a later round."""
        last = min(self._number + self._spec.staleness, self._spec.rounds - 1) + 1
        why = f"goes on after the round has closed; its update may be in one until round {last}"
        late = [task.site for task in tasks if task.state in OPEN] if last > self._number + 1 else []
        return [SiteState(round=self._number + 1, site=site, state="late", message=why) for site in late]

    def settle(self, *, last: bool = False) -> None:
        """End the tasks whose updates can be in no round any more, once this one has closed, or was the `last`."""
        if self._quorum is None:
            return
        number, staleness = self._number, self._spec.staleness
        is_last = last or number + 1 == self._spec.rounds
        entered = self._entered(range(self._oldest, number + 1))
        why = f"its update did not come within {staleness} rounds" if staleness else quorum.WITHOUT
        why = "the last round closed without its update" if is_last else why
        for round in range(self._oldest, number + 1 if is_last else number - staleness + 1):
            sites = {site for of, site in entered if of == round}
            self._journal.end_late(self._run, round, entered=sites, message=why)

    def _offer(self, attempts: Iterable[tuple[str, int]]) -> None:
        """Write tasks, all at once; those that are there already stay."""
        attempts, offers, ended = list(attempts), [], []
        previous = self._previous() if attempts else {}
        for site, attempt in attempts:
            task, key = self._task(site, attempt, previous.get(site)), Key(self._run, self._number, site, attempt)
            again = self._spec.replays if not self._number and not attempt else None
            if again and (values := kept(self._journal, again, task)):
                ended.append((key, values))
                continue
            document = to_json(task)
            signature = sign(document, self._home.owner_key, purpose="task")
            offers.append((key, document, signature))
        self._journal.record_tasks(ended)
        self._journal.add_tasks(offers)

    def _previous(self) -> dict[str, str]:
        """Return by site its newest update that the run has, where a stage feeds back what it left out of it."""
        feeds_back = any(stage.feedback for stage in upload.make(self._spec.upload))
        return self._journal.newest_updates(self._run) if feeds_back else {}

    def _task(self, site: str, attempt: int, previous: str | None) -> TaskSpec:
        key = Key(self._run, self._number, site, attempt)
        tier = self._history.tiers(self._number)[site]
        size = self._sizes.of(tier, self._number, site)
        return at_site(task_of(key, self._spec, self._history, tier=tier, size=size, previous=previous), site)

    def _stamps(self, tasks: Sequence[Row]) -> list[Stamp]:
        """Return the stamps of the accepted updates that are what their sites sent; the other attempts have failed."""
        stamps = []
        for task, check in zip(tasks, checks(self._home.blobs(), [task.update for task in tasks]), strict=True):
            try:
                stamps.append(check.result())
            except (MismatchError, NotFoundError) as error:
                self._journal.lose_update(self._key(task), f"its update was lost at the coordinator: {error}")
        return stamps

    def _key(self, task: Row) -> Key:
        return Key(self._run, task.round, task.site, task.attempt)


def task_of(key: Key, spec: Grant, history: History, *, tier: Tier, size: int, previous: str | None = None) -> TaskSpec:
    """Return what one attempt of one site of a tier is asked for in a round; `size` is that of its update in bytes."""
    built, bundle = history[BUILD], history.bundle(key.round)
    start, anchor = history.version(key.round).broadcast[tier], built.anchors.get(tier)
    return TaskSpec(
        **key._asdict(),
        rounds=spec.rounds,
        base=built.base.digest,
        manifest=bundle.manifest,
        manifest_size=bundle.manifest_size,
        adapter=start.digest,
        adapter_size=start.size,
        method=built.method,
        method_hash=built.method_hash,
        tier=tier,
        training=training(spec, built.learning_rate, number=key.round),
        continues=spec.continues,
        anchor=anchor.digest if anchor else None,
        anchor_size=anchor.size if anchor else 0,
        upload=spec.upload,
        previous=previous,
        update_size=size,
        exam=spec.exam == "sites",
    )


def checks(blobs: Blobs, digests: Iterable[str]) -> list[Future[Stamp]]:
    """Check blobs by several threads; what comes of each is its stamp, or the error that says what is wrong with it."""
    with ThreadPoolExecutor(CHECKS, thread_name_prefix="digests") as threads:
        return [threads.submit(copy_context().run, blobs.stamp, digest) for digest in digests]


def folded_updates(journal: Journal, run: str, number: int, folded: Folded) -> tuple[Update, ...]:
    """Return the updates that a round's version is made of, the round counted from zero."""
    parts = {(site, part.update) for site, part in folded.lineage.items()}
    return tuple(_update(task, number) for task in journal.tasks(run, number) if (task.site, task.update) in parts)


def _update(task: Row, number: int) -> Update:
    """Return the update of a task for a round, counted from zero."""
    metrics, age = from_json(UpdateMetrics, task.metrics, where="metrics"), number - task.round
    return Update(
        site=task.site,
        digest=task.update,
        examples=metrics.examples,
        norm=task.norm,
        chosen=metrics.chosen,
        age=age,
        start=from_json(TaskSpec, task.spec, where="task").adapter if age else None,
    )
