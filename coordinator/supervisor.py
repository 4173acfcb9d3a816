"""The run supervisor: takes one run from queued to its end.

It holds no state. Each thing it does is a step whose outcome is in the journal before the next begins; killed at any
moment and started again, it reads the journal, skips what is done and goes on with the same bytes.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from offsite.coordinator.home import Home
from offsite.coordinator.report import assemble, perplexities, training, warnings
from offsite.coordinator.store.journal import LIVE, OPEN, Key, Row
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import OffsiteError, RunError, from_status
from offsite.protos.security.signing import sign
from offsite.protos.spec import Choice, RunSpec, TaskSpec, UpdateMetrics

Perform = Callable[[str, str, str, bytes, dict[str, Any]], dict[str, Any]]

POLL_S = 0.2
PRESENT_S = 20.0  # a site is heard every 2 s while it waits or works
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
        self._document: bytes = self._journal.run(run).spec
        self._spec = from_json(RunSpec, self._document, where="run spec")

    def run(self) -> None:
        """Bring the run to its end, from wherever the journal says it is. Raises Lost, and leaves the run open."""
        try:
            self._rounds()
        except Lost:
            raise
        except Cancelled:
            log.info("run %s: cancelled", self._run)
        except OffsiteError as error:
            self._journal.end_run(self._run, "failed", error=str(error))
        except Exception as error:  # a fault of ours must end the run with a word, not leave it hanging
            log.exception("run %s", self._run)
            self._journal.end_run(self._run, "failed", error=f"internal error: {type(error).__name__}: {error}")
        finally:
            self._journal.close()

    def _rounds(self) -> None:
        if self._journal.run(self._run).state not in LIVE:
            return
        self._journal.set_run(self._run, state="running")
        sites = self._select()
        self._step("version:0", "build", sites=sites)
        self._baselines()
        for number in range(self._spec.rounds):
            self._round(number)
        self._outcome()

    # what is done once

    def _step(self, name: str, step: str, **arguments: Any) -> dict[str, Any]:
        """Do a step unless the journal has it, and return what it gave."""
        done = self._journal.steps(self._run).get(name)
        if done is not None:
            return done
        self._heed()
        self._journal.add_event(self._run, "step", step=name)
        gave = self._perform(step, str(self._home.root), str(self._home.identity), self._document, arguments)
        if "error" in gave:
            raise from_status(gave["error"]["status"], gave["error"]["message"])
        self._heed()
        return self._journal.add_step(self._run, name, gave)

    def _heed(self) -> None:
        if self._journal.run(self._run).state not in LIVE:
            raise Cancelled

    def _select(self) -> list[str]:
        """Wait for the sites of the run: those it names, or those that are here."""
        done = self._journal.steps(self._run).get("sites")
        if done is not None:
            return list(done["names"])
        deadline, told = time.time() + self._spec.stall_s, False
        while True:
            self._heed()
            present = self._present()
            wanted = [name for name in self._spec.sites if name not in present]
            if not wanted and len(present) >= self._spec.min_sites:
                break
            if not told:
                self._journal.add_event(self._run, "waiting", sites=wanted, present=present)
                told = True
            if time.time() > deadline:
                raise RunError(_absent(wanted, present, self._spec))
            time.sleep(POLL_S)
        names = sorted(self._spec.sites) or present
        self._journal.add_step(self._run, "sites", {"names": names})
        self._journal.add_event(self._run, "selected", sites=names)
        return names

    def _present(self) -> list[str]:
        since = time.time() - PRESENT_S
        return [site.name for site in self._journal.sites() if site.seen_at >= since]

    def _baselines(self) -> None:
        built = self._journal.steps(self._run)["version:0"]
        self._journal.add_event(
            self._run,
            "bundle",
            learning_rate=built["learning_rate"],
            **{key: built["bundle"][key] for key in ("layers", "bytes", "disclosed")},
        )
        if not self._spec.evaluation:
            return
        if "emulator_zero_shot" in self._journal.steps(self._run):
            return
        self._evaluate("base_zero_shot", manifest=None, exact=None)
        self._evaluate("emulator_zero_shot", manifest=built["manifest"], exact=None)
        steps = self._journal.steps(self._run)
        overall, _ = perplexities({name: steps[name]["sets"] for name in ("base_zero_shot", "emulator_zero_shot")})
        for warning in warnings(overall):  # before anything is trained
            self._journal.add_event(self._run, "warning", message=warning)

    def _evaluate(self, figure: str, *, manifest: str | None, exact: str | None) -> None:
        if figure not in self._journal.steps(self._run):
            base = self._journal.steps(self._run)["version:0"]["base"]["digest"]
            recovery = self._journal.steps(self._run)["version:0"]["recovery"]
            gave = self._step(figure, "evaluate", base=base, manifest=manifest, exact=exact, recovery=recovery)
            self._journal.add_event(self._run, "figure", name=figure, sets=gave["sets"])

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
            gave = self._step(f"version:{number + 1}", "aggregate", **start, updates=updates, sites=sites)
            for site, why in gave["left_out"].items():
                self._journal.add_event(self._run, "site", round=number + 1, site=site, state="left out", message=why)
            weighed = len(gave["lineage"])
            self._journal.add_event(self._run, "round", round=number + 1, sites=weighed, figures=gave["figures"])
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
        moved = max(task.moved_at, self._started)
        if task.state == "offered":  # the site may be busy with another run; it is enough that it is here
            moved = max(moved, *(site.seen_at for site in self._journal.sites() if site.name == task.site), 0.0)
        if time.time() - moved <= self._spec.stall_s:
            return True
        message = f"got no further for {self._spec.stall_s:.0f} s"
        if self._journal.set_task(Key(self._run, number, task.site, task.attempt), state="stalled", message=message):
            self._journal.add_event(
                self._run, "site", round=number + 1, site=task.site, state="stalled", message=message
            )
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


def _absent(wanted: list[str], present: list[str], spec: RunSpec) -> str:
    here = ", ".join(present) or "none"
    if wanted:
        return f"sites {', '.join(wanted)} did not enrol within {spec.stall_s:.0f} s (here: {here})"
    return (
        f"{len(present)} sites are here ({here}), the run needs {spec.min_sites}; start them with `offsite site join`"
    )
