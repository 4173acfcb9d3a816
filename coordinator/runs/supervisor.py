"""The run supervisor: takes one run from queued to its end.

It holds no state. Each thing it does is a step whose outcome is in the journal before the next begins; killed at any
moment and started again, it reads the journal, skips what is done and goes on with the same bytes.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.report import assemble, perplexities, training, warnings
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import LIVE, OPEN, Key, Row
from offsite.protos.documents import canonical, from_json, plain, to_json
from offsite.protos.errors import (
    MismatchError,
    NotFoundError,
    OffsiteError,
    ResourceError,
    RunError,
    from_status,
    from_system,
)
from offsite.protos.security.signing import sign
from offsite.protos.spec import Choice, TaskSpec, UpdateMetrics

Perform = Callable[[str, str, str, bytes, dict[str, Any]], dict[str, Any]]
Tell = Callable[[dict[str, Any]], list[tuple[str, dict[str, Any]]]]

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
        granted = self._journal.steps(run).get("granted")
        self._document: bytes = canonical(granted) if granted else self._journal.run(run).spec
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
            self._journal.end_run(self._run, "failed", error=str(error))
        except OSError as error:
            self._journal.end_run(self._run, "failed", error=str(from_system(error)))
        except Exception as error:  # a fault of ours must end the run with a word, not leave it hanging
            log.exception("run %s", self._run)
            self._journal.end_run(
                self._run,
                "failed",
                error=f"internal error: {type(error).__name__}: {plain(self._spec.told(error), most=300)}",
            )
        finally:
            self._journal.close()

    def _rounds(self) -> None:
        if self._journal.run(self._run).state not in LIVE:
            return
        names = self._journal.steps(self._run)["sites"]["names"]
        self._step("version:0", "build", tell=_bundle, run=self._run, sites=names)
        self._baselines()
        for number in range(self._spec.rounds):
            self._round(number)
        self._outcome()

    # what is done once

    def _step(self, name: str, step: str, *, tell: Tell | None = None, **arguments: Any) -> dict[str, Any]:
        """Do a step unless the journal has it, and return what it gave; `tell` makes the events that tell of it."""
        done = self._journal.steps(self._run).get(name)
        if done is not None:
            return done
        self._heed()
        begun = [event for event in self._journal.events(self._run, kind="step") if event.data["step"] == name]
        if len(begun) >= TRIES:
            raise ResourceError(
                f"step {name} was begun {TRIES} times and ended its process each time, so it is not tried again; "
                "most likely memory is missing: look at the system's log, and give it more memory or a smaller model"
            )
        self._journal.add_event(self._run, "step", step=name)
        gave = self._perform(step, str(self._home.root), str(self._home.identity), self._document, arguments)
        if "error" in gave:
            raise from_status(gave["error"]["status"], gave["error"]["message"])
        self._heed()
        return self._journal.add_step(self._run, name, gave, *(tell(gave) if tell else ()))

    def _heed(self) -> None:
        if self._journal.run(self._run).state not in LIVE:
            raise Cancelled

    def _baselines(self) -> None:
        built = self._journal.steps(self._run)["version:0"]
        if not self._spec.evaluation:
            return
        self._evaluate("base_zero_shot", manifest=None, exact=None)
        self._evaluate("emulator_zero_shot", manifest=built["manifest"], exact=None)

    def _evaluate(self, figure: str, *, manifest: str | None, exact: str | None) -> None:
        steps = self._journal.steps(self._run)

        def tell(gave: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
            told: list[tuple[str, dict[str, Any]]] = [("figure", {"name": figure, "sets": gave["sets"]})]
            words = steps["version:0"].get("vocabulary")
            if figure == "emulator_zero_shot":  # before anything is trained
                overall, _ = perplexities({"base_zero_shot": steps["base_zero_shot"]["sets"], figure: gave["sets"]})
                told += [("warning", {"message": warning}) for warning in warnings(overall, vocabulary=words)]
            return told

        base, recovery = steps["version:0"]["base"]["digest"], steps["version:0"]["recovery"]
        self._step(figure, "evaluate", tell=tell, base=base, manifest=manifest, exact=exact, recovery=recovery)

    # a round

    def _round(self, number: int) -> None:
        steps = self._journal.steps(self._run)
        gave = steps.get(f"version:{number + 1}")
        if gave is None:
            sites = steps["sites"]["names"]
            for site in sites:
                self._offer(number, site, attempt=0)
            updates = self._collect(number)
            start = {name: steps[f"version:{number}"][name] for name in ("residual", "broadcast")}
            name, tell = f"version:{number + 1}", partial(_round, number + 1)
            gave = self._step(name, "aggregate", tell=tell, **start, updates=updates, sites=sites)
        every = self._spec.evaluate_every
        if self._spec.evaluation and every and (number + 1) % every == 0 and number + 1 < self._spec.rounds:
            self._evaluate(f"plug_in:{number + 1}", manifest=None, exact=gave["exact"])
        if self._spec.realign_steps and number + 1 < self._spec.rounds:
            built = steps["version:0"]
            base, recovery, manifest = built["base"]["digest"], built["recovery"], self._bundle(number)["manifest"]
            name, exact = f"bundle:{number + 1}", gave["exact"]
            self._step(name, "realign", base=base, manifest=manifest, exact=exact, recovery=recovery)

    def _bundle(self, number: int) -> dict[str, Any]:
        """Return the bundle that sites train on in a round: re-aligned to the last, if the run asks for that."""
        steps = self._journal.steps(self._run)
        return next(
            (steps[f"bundle:{at}"] for at in range(number, 0, -1) if f"bundle:{at}" in steps), steps["version:0"]
        )

    def _offer(self, number: int, site: str, *, attempt: int) -> None:
        steps = self._journal.steps(self._run)
        built, bundle, start = steps["version:0"], self._bundle(number), steps[f"version:{number}"]["broadcast"][site]
        task = TaskSpec(
            run=self._run,
            round=number,
            rounds=self._spec.rounds,
            site=site,
            attempt=attempt,
            base=built["base"]["digest"],
            manifest=bundle["manifest"],
            manifest_size=bundle["manifest_size"],
            adapter=start["digest"],
            adapter_size=start["size"],
            method=_without_ranks(self._spec.method),
            method_hash=built["method_hash"],
            training=training(self._spec, built),
        )
        document = to_json(task)
        signature = sign(document, self._home.owner_key, purpose="task")
        self._journal.add_task(Key(self._run, number, site, attempt), spec=document, signature=signature)

    def _collect(self, number: int) -> list[dict[str, Any]]:
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
        return [
            {
                "site": task.site,
                "digest": task.update,
                "examples": from_json(UpdateMetrics, task.metrics, where="metrics").examples,
            }
            for task in done
        ]

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
        if self._journal.set_task(Key(self._run, number, task.site, task.attempt), state="stalled", message=message):
            self._journal.add_event(
                self._run, "site", round=number + 1, site=task.site, state="stalled", message=message
            )
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
        steps = self._journal.steps(self._run)
        exact = steps[f"version:{self._spec.rounds}"]["exact"]
        if self._spec.evaluation:
            self._evaluate("emulator_tuned", manifest=self._bundle(self._spec.rounds - 1)["manifest"], exact=exact)
            self._evaluate("plug_in", manifest=None, exact=exact)
        built = steps["version:0"]
        gave = self._step("publish", "publish", base=built["base"]["digest"], exact=exact, recovery=built["recovery"])
        for name, file in gave["artifacts"].items():
            self._journal.add_artifact(self._run, name, digest=file["digest"], size=file["size"])
        self._journal.set_run(self._run, report=assemble(self._journal, self._run))
        self._journal.end_run(self._run, "completed")


def _without_ranks(method: Choice) -> Choice:
    """What a site is told of the method: not who else takes part, nor at which rank; its own is the broadcast's."""
    return Choice(name=method.name, settings={k: v for k, v in method.settings.items() if k != "ranks"})


def _bundle(gave: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    shown = {key: gave["bundle"][key] for key in ("layers", "bytes", "disclosed")}
    return [("bundle", shown | {name: gave[name] for name in ("learning_rate", "computed")})]


def _round(number: int, gave: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    left_out = [
        ("site", {"round": number, "site": site, "state": "left out", "message": why})
        for site, why in gave["left_out"].items()
    ]
    averaged = {"round": number, "sites": len(gave["lineage"]), "figures": gave["figures"]}
    return [*left_out, ("round", averaged)]
