"""The run supervisor: takes one run from queued to its end.

It holds no state. Each thing it does is a step whose outcome is in the journal before the next begins; killed at any
moment and started again, it reads the journal, skips what is done and goes on with the same bytes.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from offsite.coordinator.bundles import disclosures
from offsite.coordinator.home import Home
from offsite.coordinator.runs import ending, judging, news
from offsite.coordinator.runs.continuing import continued
from offsite.coordinator.runs.examination import Examination
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import GRANT, History
from offsite.coordinator.runs.needs import Needs, NoRoom, of
from offsite.coordinator.runs.replaying import certificate
from offsite.coordinator.runs.report import assemble, perplexities, warnings
from offsite.coordinator.runs.rounds import Round, folded_updates
from offsite.coordinator.runs.steps import results
from offsite.coordinator.runs.steps.orders import (
    Aggregate,
    Build,
    Compare,
    Evaluate,
    Gather,
    Order,
    Realign,
    Update,
)
from offsite.coordinator.runs.steps.results import BUILD, GATHER, SELECT, STOP, Built, Evaluation, Folded, Step
from offsite.coordinator.store import Unusable
from offsite.coordinator.store.database import Watch
from offsite.coordinator.store.journal import LIVE
from offsite.protos.documents import from_json, plain, to_json
from offsite.protos.errors import OffsiteError, ResourceError, from_system
from offsite.protos.events import (
    Completed,
    Event,
    Failed,
    Measured,
    StepBegun,
    StepLost,
    Stopped,
    Warned,
)
from offsite.protos.figures import BASE_ZERO_SHOT, EMULATOR_ZERO_SHOT, PLUG_IN
from offsite.protos.telemetry.logs import about

R = TypeVar("R")
Perform = Callable[[str, bytes, bytes, Needs], bytes]  # step, run spec, order, what that needs -> result
Train = Callable[[History, int], Folded]  # does a round, counted from zero, whose sites are none to wait for

POLL_S = 0.05  # of one number, whether the journal has changed
POLLS = 20  # until a round is looked at though it has not
AGAIN_S = 5.0  # before a step that could not use a store is done again
ROOM_S = 300.0  # that a step waits for a node which is large enough: one that was lost may come back
TRIES = 6  # a step that ends its process so often, or is killed so often, ends the run

log = logging.getLogger(__name__)


class Lost(Exception):
    """What does the steps went away under one, how if it is known.

    Nothing is wrong with the run, and another supervisor takes it up.
    """


class Cancelled(Exception):
    """The run was cancelled while it was worked on."""


class Superseded(Exception):
    """Another gateway dispatches by now; its supervisor works on the run."""


class Supervisor:
    """One run's state machine over the journal."""

    def __init__(
        self,
        home: Home,
        run: str,
        *,
        perform: Perform,
        rest: Callable[[float], None] = time.sleep,
        train: Train | None = None,
    ) -> None:
        self._home = home
        self._journal = home.journal()
        self._run = run
        self._perform, self._rest = perform, rest  # how a step is done; what it does for some seconds of waiting
        self._train = train  # in place of live sites; None: tasks are offered to those, and waited for
        self._started = time.time()  # while no coordinator was up, no site could say that it got further
        self._leader = self._journal.leader()
        self._history = History(self._journal, run)
        granted = self._history.get(GRANT)
        self._document: bytes = to_json(granted) if granted else self._journal.run(run).spec
        self._spec = from_json(Grant, self._document, where="run spec")

    def run(self) -> None:
        """Bring the run to its end, from wherever the journal says it is.

        Raises Lost or Unusable, and leaves the run open.
        """
        with about(run=self._run):
            self._bring()

    def _bring(self) -> None:
        try:
            self._rounds()
        except (Lost, Unusable):
            raise
        except Cancelled:
            log.info("run %s: cancelled", self._run)
        except Superseded:
            log.info("run %s: left to another gateway", self._run)
        except OffsiteError as error:
            self._fail(str(error))
        except OSError as error:
            self._fail(str(from_system(error)))
        except Exception as error:  # a fault of ours must end the run with a word, not leave it hanging
            log.exception("run %s", self._run)
            self._fail(self._spec.fault(error))
        finally:
            self._journal.close()

    def _fail(self, error: str) -> None:
        """End the run, unless it is another gateway's by now: what is wrong here may not be wrong there."""
        if self._journal.leader() != self._leader:
            log.info("run %s: left to another gateway, after: %s", self._run, error)
            return
        self._journal.end_run(self._run, Failed(error=plain(error, most=10_000)))

    def _rounds(self) -> None:
        run = self._journal.run(self._run)
        if run.state not in LIVE:
            return
        if run.note:  # what one before this waited for
            self._journal.set_run(self._run, note="")
        if self._home.node.shared:
            self._spec = replace(self._spec, inputs=self._do(GATHER, Gather()).places)
            self._document = to_json(self._spec)
        origin = continued(self._journal, self._spec.continues) if self._spec.continues else None
        order = Build(sites=self._history[SELECT].names, continued=origin)
        self._do(BUILD, order, news.built, accept=self._accept)
        for number in range(self._spec.rounds):
            if self._stops(number):
                if self._train is None:
                    self._at(number - 1).settle(last=True)
                break
            with about(round=number + 1):
                self._round(number)
        last = self._history.rounds(self._spec.rounds)
        examination = Examination(self._home, self._journal, self._run, self._spec, self._history, last)
        if self._train is None:
            examination.open()  # sites measure while this end does
        self._contributions(last)
        published = ending.end(self._spec, self._history, self._do, self._evaluate)
        if self._train is None:
            self._examined(examination)
        if again := self._spec.replays:
            published |= certificate(self._home, self._journal, self._run, again)
        report = assemble(self._journal, self._run)
        self._journal.end_run(self._run, Completed(), report=report, published=published)

    # what is done once

    def _do(
        self,
        step: Step[R],
        order: Order,
        tell: Callable[[R], list[Event]] = lambda _: [],
        *,
        accept: Callable[[R], R] = lambda result: result,
    ) -> R:
        """Do a step unless the journal has it, and return its result.

        `accept` judges it and returns what of it is kept, `tell` makes the events that tell of that.
        """
        done = self._history.get(step)
        if done is not None:
            return done
        self.heed()
        begun = [event for event in self._journal.events(self._run, kind=StepBegun.kind)]
        if sum(event.data["step"] == step.name for event in begun) >= TRIES:
            raise ResourceError(self._hopeless(step))
        self._journal.add_event(self._run, StepBegun(step=step.name))
        try:
            with about(step=order.step):
                result = accept(from_json(step.gives, self._work(order), where=f"step {step.name}"))
        except Lost as lost:
            if words := plain(self._spec.wording(lost), most=1000):
                self._journal.add_event(self._run, StepLost(step=step.name, message=words))
            raise
        self.heed()
        return self._history.record(step, result, *tell(result))

    def _hopeless(self, step: Step[R]) -> str:
        """Say why a step is not tried again."""
        lost = [event.data for event in self._journal.events(self._run, kind=StepLost.kind)]
        last = next((data["message"] for data in reversed(lost) if data["step"] == step.name), "")
        return (
            f"step {step.name} was begun {TRIES} times and came to no end, so it is not tried again; "
            f"{f'the last time: {last}; ' if last else ''}"
            "where a process was killed, most likely memory is missing: look at the system's log, and give it more "
            "memory or a smaller model"
        )

    def _work(self, order: Order) -> bytes:
        """Have a step done and return what it gives.

        Where a store cannot be used, it is done again until it can; where no node is large enough, for a while.
        """
        needs, begun, warned = of(order, self._spec, self._history.get(BUILD)), time.monotonic(), False
        while True:
            try:
                result = self._perform(order.step, self._document, to_json(order), needs)
                if warned:
                    self._journal.set_run(self._run, note="")
                return result
            except Unusable as error:
                said = str(error)  # whoever watches need not know where the owner's files lie
                waits = f"step {order.step} waits until the coordinator can use its stored files; its log says more"
            except NoRoom as error:
                if time.monotonic() - begun > ROOM_S:
                    raise
                waits = said = f"{error}; it waits for one for {ROOM_S / 60:.0f} minutes"
            if not warned:
                log.error("run %s: %s; the run goes on once that is done", self._run, said)
                self._journal.add_event(self._run, Warned(message=waits))
            warned = True
            self._journal.set_run(self._run, note=waits)
            self._rest(AGAIN_S)
            self.heed()

    def waits(self, note: str) -> None:
        """Have the run say what a step of it waits for; empty once it has begun."""
        self._journal.set_run(self._run, note=note)

    def heed(self) -> None:
        """Raise Cancelled if the run is over, Superseded if it is another gateway's by now."""
        if self._journal.run(self._run).state not in LIVE:
            raise Cancelled
        if self._journal.leader() != self._leader:
            raise Superseded

    def _evaluate(
        self, figure: str, *, manifest: str | None, adapter: str | None, memory: dict[str, str] | None = None
    ) -> None:
        order = self._evaluation(manifest=manifest, adapter=adapter, memory=memory)
        self._do(results.evaluate(figure), order, partial(self._measured, figure))

    def _evaluation(
        self, *, manifest: str | None = None, adapter: str | None, memory: dict[str, str] | None = None
    ) -> Evaluate:
        built = self._history[BUILD]
        return Evaluate(
            base=built.base.digest, manifest=manifest, adapter=adapter, recovery=built.recovery, memory=memory or {}
        )

    def _measured(self, figure: str, measured: Evaluation) -> list[Event]:
        news: list[Event] = [Measured(name=figure, sets=measured.sets)]
        if figure == EMULATOR_ZERO_SHOT:  # before anything is trained
            base = self._history[results.evaluate(BASE_ZERO_SHOT)]
            overall, _ = perplexities({BASE_ZERO_SHOT: base.sets, figure: measured.sets})
            vocabulary = self._history[BUILD].vocabulary
            news += [Warned(message=warning) for warning in warnings(overall, vocabulary=vocabulary)]
        return news

    def _accept(self, built: Built) -> Built:
        """Hold what was built against the owner's policy, and record what it discloses; raises RefusedError."""
        bound = self._spec.role == "researcher"
        if bound:
            largest = max(adapter.size for adapter in built.version.broadcast.values())
            self._home.policy().check_built(sites=len(built.tiers), adapter=largest, bundle=built.bundle.bytes)
        disclosures.record(self._home, self._run, base=built.base.digest, portions=built.portions, bound=bound)
        return replace(built, portions={})

    # a round

    def _round(self, number: int) -> None:
        built, step = self._history[BUILD], results.fold(number + 1)
        if self._history.get(step) is None and self._train is None:
            current = self._at(number)
            closed = self._history.get(results.closing(number + 1))
            if closed is None:
                current.open()
            self._measure(number)  # while the sites train
            if number:
                self._contributions(number)
            updates = closed.updates if closed else self._close(current)
            current.settle()
            self._do(step, self._fold(number, updates), partial(news.folded, number + 1))
        elif self._history.get(step) is None and self._train:
            self._measure(number)
            folded = self._train(self._history, number)
            self._history.record(step, folded, *news.folded(number + 1, folded))
        if self._spec.realign_steps and number + 1 < self._spec.rounds:  # the next round trains on what this gives
            manifest, adapter = self._history.bundle(number).manifest, self._history[step].version.adapter
            realign = Realign(base=built.base.digest, manifest=manifest, adapter=adapter, recovery=built.recovery)
            self._do(results.realign(number + 1), realign)

    def _at(self, number: int) -> Round:
        return Round(self._home, self._journal, self._run, self._spec, self._history, number)

    def _fold(self, number: int, updates: tuple[Update, ...]) -> Aggregate:
        built = self._history[BUILD]
        return Aggregate(
            last=self._history.version(number),
            schema=built.schema,
            tiers={one.site: self._history.tiers(number - one.age)[one.site] for one in updates},
            updates=updates,
            round=self._spec.rounds_before + number,
            groups=built.groups,
        )

    def _contributions(self, number: int) -> None:
        """Measure what each site gave to the version of a round, counted from one, where the run asks for that.

        Once the plug-in of that version has been measured, so is that of the round without each of its sites.
        """
        folded = self._history[results.fold(number)]
        updates = folded_updates(self._journal, self._run, number - 1, folded)
        if not self._spec.contributions or not updates:
            return
        whole = self._fold(number - 1, updates)
        weights = {site: part.weight for site, part in folded.lineage.items()}
        self._do(results.compare(number), Compare(folded=replace(whole, weights=weights)))
        for site in sorted(weights) if self._spec.evaluation and len(weights) > 1 else ():
            rest = {name: weight / (1 - weights[site]) for name, weight in weights.items() if name != site}
            others = tuple(update for update in updates if update.site != site)
            version = self._do(results.without(number, site), replace(whole, updates=others, weights=rest)).version
            self._do(results.lacking(number, site), self._evaluation(adapter=version.adapter, memory=version.memory))

    def _measure(self, number: int) -> None:
        """Measure what a round starts from: the base and the emulator, later versions where the run asks for that."""
        if not self._spec.evaluation:
            return
        if not number:
            self._evaluate(BASE_ZERO_SHOT, manifest=None, adapter=None)
            self._evaluate(EMULATOR_ZERO_SHOT, manifest=self._history[BUILD].manifest, adapter=None)
        elif judging.due(self._spec, number):
            version = self._history[results.fold(number)].version
            self._evaluate(f"{PLUG_IN}:{number}", manifest=None, adapter=version.adapter, memory=version.memory)

    def _stops(self, number: int) -> bool:
        """Tell whether the run stops after a round, counted from one, which is measured first if it may."""
        if self._spec.patience and number and self._history.get(STOP) is None:
            self._measure(number)
            if stop := judging.stop(self._spec, self._history, number):
                self._history.record(STOP, stop, Stopped(round=stop.round, best=stop.best, message=stop.reason))
        return (stop := self._history.get(STOP)) is not None and number >= stop.round

    def _close(self, current: Round) -> tuple[Update, ...]:
        """Wait until a round's tasks are done; return its updates, or fail the run if they are too few."""
        note = ""
        with closing(self._journal.watch()) as watch:
            while True:
                if not current.look(since=self._started) and (updates := current.close()) is not None:
                    if note:
                        self.waits("")
                    return updates
                if note != (note := current.note()):
                    self.waits(note)
                self.heed()
                self._wait(watch, current.until)

    def _wait(self, watch: Watch, until: float) -> None:
        """Wait until the journal has changed, or a while: time alone may be up for a site, or for a round."""
        for _ in range(POLLS):
            self._rest(POLL_S)
            if watch.changed() or time.time() >= until:
                return

    def _examined(self, examination: Examination) -> None:
        """Wait until no site is at the exam any more."""
        with closing(self._journal.watch()) as watch:
            while not examination.over(since=self._started):
                self.heed()
                self._wait(watch, math.inf)
