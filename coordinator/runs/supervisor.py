"""The run supervisor: takes one run from queued to its end.

It holds no state. Each thing it does is a step whose outcome is in the journal before the next begins; killed at any
moment and started again, it reads the journal, skips what is done and goes on with the same bytes.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import GRANT, History
from offsite.coordinator.runs.report import assemble, perplexities, training, warnings
from offsite.coordinator.runs.steps import results
from offsite.coordinator.runs.steps.orders import Aggregate, Attack, Build, Evaluate, Order, Publish, Realign, Update
from offsite.coordinator.runs.steps.results import (
    ATTACK,
    BUILD,
    PUBLISH,
    SELECT,
    Built,
    Evaluation,
    Folded,
    Step,
    Version,
)
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import LIVE, OPEN, Key, Row
from offsite.protos.documents import from_json, plain, to_json
from offsite.protos.errors import MismatchError, NotFoundError, OffsiteError, ResourceError, RunError, from_system
from offsite.protos.events import (
    Completed,
    EmulatorBuilt,
    Event,
    Failed,
    Measured,
    RoundDone,
    SiteState,
    StepBegun,
    Warned,
)
from offsite.protos.security.signing import sign
from offsite.protos.spec import Choice, TaskSpec, UpdateMetrics

R = TypeVar("R")
Perform = Callable[[str, str, str, bytes, bytes], bytes]  # step, home, identity, run spec, order -> result

POLL_S = 0.2
TRIES = 6  # a step that ends its process so often, or is killed so often, ends the run
ATTEMPTS = 2  # a site that fails a task is asked once more

log = logging.getLogger(__name__)


class Lost(Exception):
    """What does the steps went away under one; nothing is wrong with the run, and another supervisor takes it up."""


class Cancelled(Exception):
    """The run was cancelled while it was worked on."""


class Supervisor:
    """One run's state machine over the journal."""

    def __init__(self, home: Home, run: str, *, perform: Perform) -> None:
        self._home = home
        self._journal = home.journal()
        self._run = run
        self._perform = perform
        self._started = time.time()  # while no coordinator was up, no site could say that it got further
        self._history = History(self._journal, run)
        granted = self._history.get(GRANT)
        self._document: bytes = to_json(granted) if granted else self._journal.run(run).spec
        self._spec = from_json(Grant, self._document, where="run spec")
        self._begun: dict[tuple[int, str], float | None] = {}

    def run(self) -> None:
        """Bring the run to its end, from wherever the journal says it is.

        Raises Lost or Unwritable, and leaves the run open.
        """
        try:
            self._rounds()
        except (Lost, Unwritable):
            raise
        except Cancelled:
            log.info("run %s: cancelled", self._run)
        except OffsiteError as error:
            self._fail(str(error))
        except OSError as error:
            self._fail(str(from_system(error)))
        except Exception as error:  # a fault of ours must end the run with a word, not leave it hanging
            log.exception("run %s", self._run)
            self._fail(f"internal error: {type(error).__name__}: {plain(self._spec.told(error), most=300)}")
        finally:
            self._journal.close()

    def _fail(self, error: str) -> None:
        self._journal.end_run(self._run, Failed(error=error))

    def _rounds(self) -> None:
        if self._journal.run(self._run).state not in LIVE:
            return
        self._do(BUILD, Build(run=self._run, sites=self._history[SELECT].names), _built)
        self._baselines()
        for number in range(self._spec.rounds):
            self._round(number)
        self._outcome()

    # what is done once

    def _do(self, step: Step[R], order: Order, tell: Callable[[R], list[Event]] = lambda _: []) -> R:
        """Do a step unless the journal has it, and return its result; `tell` makes the events that tell of it."""
        done = self._history.get(step)
        if done is not None:
            return done
        self._heed()
        begun = [event for event in self._journal.events(self._run, kind=StepBegun.kind)]
        if sum(event.data["step"] == step.name for event in begun) >= TRIES:
            raise ResourceError(
                f"step {step.name} was begun {TRIES} times and ended its process each time, so it is not tried again; "
                "most likely memory is missing: look at the system's log, and give it more memory or a smaller model"
            )
        self._journal.add_event(self._run, StepBegun(step=step.name))
        where = str(self._home.root), str(self._home.identity)
        document = self._perform(order.step, *where, self._document, to_json(order))
        result = from_json(step.gives, document, where=f"step {step.name}")
        self._heed()
        return self._history.record(step, result, *tell(result))

    def _heed(self) -> None:
        if self._journal.run(self._run).state not in LIVE:
            raise Cancelled

    def _baselines(self) -> None:
        if self._spec.evaluation:
            self._evaluate("base_zero_shot", manifest=None, exact=None)
            self._evaluate("emulator_zero_shot", manifest=self._history[BUILD].manifest, exact=None)

    def _evaluate(self, figure: str, *, manifest: str | None, exact: str | None) -> None:
        built = self._history[BUILD]
        order = Evaluate(base=built.base.digest, manifest=manifest, exact=exact, recovery=built.recovery)
        self._do(results.evaluate(figure), order, partial(self._measured, figure))

    def _measured(self, figure: str, measured: Evaluation) -> list[Event]:
        news: list[Event] = [Measured(name=figure, sets=measured.sets)]
        if figure == "emulator_zero_shot":  # before anything is trained
            base = self._history[results.evaluate("base_zero_shot")]
            overall, _ = perplexities({"base_zero_shot": base.sets, figure: measured.sets})
            vocabulary = self._history[BUILD].vocabulary
            news += [Warned(message=warning) for warning in warnings(overall, vocabulary=vocabulary)]
        return news

    # a round

    def _round(self, number: int) -> None:
        built, sites = self._history[BUILD], self._history[SELECT].names
        folded = self._history.get(results.fold(number + 1))
        if folded is None:
            self._offer(number, *sites, attempt=0)
            updates, last = self._collect(number), self._version(number)
            order = Aggregate(residual=last.residual, broadcast=last.broadcast, updates=updates, sites=sites)
            folded = self._do(results.fold(number + 1), order, partial(_folded, number + 1))
        more = number + 1 < self._spec.rounds
        every = self._spec.evaluate_every
        if self._spec.evaluation and every and (number + 1) % every == 0 and more:
            self._evaluate(f"plug_in:{number + 1}", manifest=None, exact=folded.exact)
        if self._spec.realign_steps and more:
            manifest = self._history.bundle(number).manifest
            realign = Realign(base=built.base.digest, manifest=manifest, exact=folded.exact, recovery=built.recovery)
            self._do(results.realign(number + 1), realign)

    def _version(self, number: int) -> Version:
        return self._history[results.fold(number)] if number else self._history[BUILD]

    def _offer(self, number: int, *sites: str, attempt: int) -> None:
        """Write tasks of a round, all at once; those that are there already stay."""
        tasks = [self._task(number, site, attempt) for site in sites]
        signed = [(document, sign(document, self._home.owner_key, purpose="task")) for document in map(to_json, tasks)]
        keys = [Key(self._run, number, site, attempt) for site in sites]
        self._journal.add_tasks((key, *offer) for key, offer in zip(keys, signed, strict=True))

    def _task(self, number: int, site: str, attempt: int) -> TaskSpec:
        built, bundle = self._history[BUILD], self._history.bundle(number)
        start = self._version(number).broadcast[site]
        return TaskSpec(
            run=self._run,
            round=number,
            rounds=self._spec.rounds,
            site=site,
            attempt=attempt,
            base=built.base.digest,
            manifest=bundle.manifest,
            manifest_size=bundle.manifest_size,
            adapter=start.digest,
            adapter_size=start.size,
            method=_without_ranks(self._spec.method),
            method_hash=built.method_hash,
            training=training(self._spec, built.learning_rate),
        )

    def _collect(self, number: int) -> tuple[Update, ...]:
        """Wait until no task of the round is open; return the updates, or fail the run if they are too few."""
        while any([self._is_open(number, task) for task in self._latest(number)]):  # a list: each one is looked at
            self._heed()
            time.sleep(POLL_S)
        tasks = self._latest(number)
        if any([self._is_rotten(number, task) for task in tasks if task.state == "uploaded"]):
            return self._collect(number)  # from sites that are asked once more
        done = [task for task in tasks if task.state == "uploaded"]
        if len(done) < self._spec.min_sites:
            why = "; ".join(f"{task.site}: {task.state}: {task.message}" for task in tasks if task.state != "uploaded")
            raise RunError(f"round {number + 1} got {len(done)} of at least {self._spec.min_sites} updates ({why})")
        return tuple(Update(site=task.site, digest=task.update, examples=_metrics(task).examples) for task in done)

    def _latest(self, number: int) -> list[Row]:
        """Return each site's last attempt."""
        return list({task.site: task for task in self._journal.tasks(self._run, number)}.values())

    def _is_open(self, number: int, task: Row) -> bool:
        """Tell whether a task may still give an update; offers another attempt, and leaves out who got stuck."""
        if task.state == "failed" and task.attempt + 1 < ATTEMPTS:
            self._offer(number, task.site, attempt=task.attempt + 1)
            return True
        if task.state not in OPEN:
            return False
        if (begun := self._begun_at(number, task.site)) and time.time() - begun > self._spec.task_s:
            return self._leave_out(number, task, f"was not done {self._spec.task_s:.0f} s after it took its task")
        moved = max(task.moved_at, self._started)
        if task.state == "offered":  # the site may be busy with another run; it is enough that it is here
            moved = max(moved, *(site.seen_at for site in self._journal.sites() if site.name == task.site), 0.0)
        if time.time() - moved <= self._spec.stall_s:
            return True
        return self._leave_out(number, task, f"got no further for {self._spec.stall_s:.0f} s")

    def _begun_at(self, number: int, site: str) -> float | None:
        """When a site took its first task of a round; the journal knows, so no restart gives it more time."""
        if self._begun.get((number, site)) is None:
            self._begun[number, site] = self._journal.begun_at(self._run, number, site)
        return self._begun[number, site]

    def _leave_out(self, number: int, task: Row, message: str) -> Literal[False]:
        self._journal.close_task(Key(self._run, number, task.site, task.attempt), "stalled", message)
        return False

    def _is_rotten(self, number: int, task: Row) -> bool:
        """Tell whether an accepted update is no longer what the site sent; the attempt has failed then."""
        try:
            self._home.blobs().path(task.update)
        except (MismatchError, NotFoundError) as error:
            message = f"its update was lost at the coordinator: {error}"
            self._journal.lose_update(Key(self._run, number, task.site, task.attempt), message)
            return True
        return False

    # the end

    def _outcome(self) -> None:
        built, rounds = self._history[BUILD], self._spec.rounds
        exact = self._history[results.fold(rounds)].exact
        if self._spec.evaluation:
            self._evaluate("emulator_tuned", manifest=self._history.bundle(rounds - 1).manifest, exact=exact)
            self._evaluate("plug_in", manifest=None, exact=exact)
        if self._spec.attack_steps:
            order = Attack(manifest=self._history.bundle(rounds - 1).manifest, exact=exact)
            self._do(ATTACK, order, lambda made: [Measured(name="attack", sets=made.attacks[0].sets)])
        published = self._do(PUBLISH, Publish(base=built.base.digest, exact=exact, recovery=built.recovery))
        report = assemble(self._journal, self._run)
        self._journal.end_run(self._run, Completed(), report=report, published=published.artifacts)


def _without_ranks(method: Choice) -> Choice:
    """What a site is told of the method: not who else takes part, nor at which rank; its own is the broadcast's."""
    return Choice(name=method.name, settings={k: v for k, v in method.settings.items() if k != "ranks"})


def _metrics(task: Row) -> UpdateMetrics:
    return from_json(UpdateMetrics, task.metrics, where="metrics")


def _built(built: Built) -> list[Event]:
    about = built.bundle
    return [
        EmulatorBuilt(
            layers=about.layers,
            bytes=about.bytes,
            disclosed=about.disclosed,
            learning_rate=built.learning_rate,
            computed=built.computed,
        )
    ]


def _folded(number: int, folded: Folded) -> list[Event]:
    left_out = [
        SiteState(round=number, site=site, state="left out", message=why) for site, why in folded.left_out.items()
    ]
    return [*left_out, RoundDone(round=number, sites=len(folded.lineage), figures=folded.figures)]
