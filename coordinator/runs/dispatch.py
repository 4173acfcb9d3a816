"""Which runs are worked on: here all wait, without a thread of their own, until their sites and a place are there."""

import asyncio
import time

from offsite.coordinator.runs.executor import Executor
from offsite.coordinator.runs.rounds import PRESENT_S
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal, Row
from offsite.protos.documents import from_json
from offsite.protos.errors import InputError
from offsite.protos.events import Failed, Waiting
from offsite.protos.spec import RunSpec

LOOK_S = 0.5  # though nothing was written: time alone may be up
REST_S = 0.1  # after a look, however much is written
SUPERVISE_EVERY_S = 5.0  # one that has ended without its run, as after a short fault, is replaced so soon
PLACES = 8  # runs worked on at once: on Ray each has a process of its own


class Dispatcher:
    """Gives runs their sites and their supervisors, the oldest first."""

    def __init__(self, journal: Journal, executor: Executor, *, places: int = PLACES) -> None:
        self._journal, self._executor, self._places = journal, executor, places
        self._leader = journal.leader()
        self._specs: dict[str, RunSpec] = {}
        self._fault: str | None = None  # why the executor could not work at the last look; None: there was none
        self._hindered = False  # whether the journal could not be used at the last look
        self._supervised = float("-inf")
        self._started = time.time()

    async def work(self, changes: Changes) -> None:
        """Look again and again; a disk that is full is waited for, a damaged journal raises."""
        number = -1
        while True:
            number = await changes.after(number, timeout_s=LOOK_S)
            try:
                if self._hindered:
                    self._supervised = float("-inf")  # supervisors have ended of the same
                await asyncio.to_thread(self.look)
                self._hindered = False
            except Unwritable:  # the gateway says so, once
                self._hindered = True
            await asyncio.sleep(REST_S)

    def look(self) -> None:
        """Take each run as far as it can be taken now."""
        runs = self._runs()
        fault, before = self._executor.fault, self._fault
        self._fault = fault
        idle = all(run.state == "running" for run in runs)
        present = [] if idle else self._journal.present(time.time() - PRESENT_S)
        running = [run for run in runs if run.state == "running"]
        free = self._places - len(running)
        if not fault and (before or time.monotonic() - self._supervised > SUPERVISE_EVERY_S):
            self._supervised = time.monotonic()  # again and again: a supervisor that was lost is replaced
            for run in running:
                self._executor.supervise(run.id)
        for run in running:
            self._note(run, fault, before)
        for run in runs:
            if run.state == "running":
                continue
            spec = self._specs[run.id]
            missing = [name for name in spec.sites if name not in present]
            if missing or len(present) < spec.min_sites:
                self._wait(run, spec, missing, present)
            elif fault or free <= 0:
                note = fault or f"waits until one of {self._places} runs that are worked on has ended"
                if run.state != "queued" or run.note != note:
                    self._journal.set_run(run.id, state="queued", note=note, waiting_at=0.0)
            elif self._journal.begin_run(run.id, sorted(spec.sites) or present):
                self._executor.supervise(run.id)
                free -= 1

    def _runs(self) -> list[Row]:
        """Return the runs that are not over, and read what was submitted; none if another gateway dispatches by now."""
        if self._journal.leader() != self._leader:
            return []
        runs = self._journal.live()
        self._specs = {run.id: spec for run in runs if (spec := self._spec(run.id))}
        return [run for run in runs if run.id in self._specs]

    def _spec(self, run: str) -> RunSpec | None:
        """Return what was submitted; a run whose spec another version wrote, or the disk garbled, ends here."""
        if run in self._specs:
            return self._specs[run]
        try:
            return from_json(RunSpec, self._journal.run(run).spec, where="run spec")
        except InputError as error:
            self._journal.end_run(run, Failed(error=str(error)))
            return None

    def _note(self, run: Row, fault: str, before: str | None) -> None:
        """Have a run say what keeps all runs from going on, and what did no longer; what its supervisor says stays."""
        note = fault or ("" if before is None or run.note == before else run.note)
        if run.note != note:
            self._journal.set_run(run.id, note=note)

    def _wait(self, run: Row, spec: RunSpec, missing: list[str], present: list[str]) -> None:
        """Let a run wait, or end it when it has waited for as long as it may."""
        more = spec.min_sites - len(present)
        what = f"site{'s' * (len(missing) > 1)} {', '.join(missing)}" if missing else f"{more} more sites"
        note = f"waits for {what}"
        if run.state == "queued" or run.note != note:
            self._journal.wait_run(run.id, note, Waiting(sites=tuple(missing), present=tuple(present)))
        # While no coordinator was up, no site could come.
        since = max(run.waiting_at or time.time(), self._started - spec.wait_s + min(spec.wait_s, PRESENT_S))
        if time.time() - since > spec.wait_s:
            here = ", ".join(present) or "none"
            came = f"{what} did not enrol" if missing else f"{what} did not enrol, of at least {spec.min_sites},"
            error = f"{came} within {spec.wait_s:g} s (here: {here}); `offsite site join` starts one"
            self._journal.end_run(run.id, Failed(error=error))
